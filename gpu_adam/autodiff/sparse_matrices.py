"""Sparse matrices of SciPy and CuPy as constants of a loss, in products with recorded arrays.

These work, for arrays and matrices of every two-dimensional format, and so do their reflections:

    A @ w    A.dot(w)    A * w, where A is a matrix, such as csr_matrix, and not an array, such as csr_array

The gradient with respect to w is A^H g.  Everything else with a sparse operand is refused: `A + w`, `A.multiply(w)`,
`numpy.dot(A, w)`, of which NumPy makes an array of objects, and `A.dot(w)` of the format coo, which takes arrays only.

A product records a copy of the matrix, or watches its arrays where they are large (see constants.py).
"""

from typing import Any

from gpu_adam.autodiff.lines import caller

_PACKAGES = ("scipy.sparse", "cupyx.scipy.sparse")
# SciPy's method for products, which asks NumPy for an array where it does not know the type of the other factor.
_SCIPYS_PRODUCT = "_matmul_dispatch"


def is_sparse(value: Any) -> bool:
    """Whether a value is a sparse matrix or a sparse array."""
    return type(value).__module__.startswith(_PACKAGES) and hasattr(value, "tocsr")


def multiplies_as_matrix(value: Any) -> bool:
    """Whether the operator * with this value is a product of matrices."""
    return is_sparse(value) and any(kind.__name__ == "spmatrix" for kind in type(value).__mro__)


def with_kept_arrays(matrix: Any, kept: Any) -> Any:
    """The same matrix over arrays that do not change.

    Args:
        matrix: of any format.
        kept: a function that takes an array and returns what to read in its place later.
    """
    if matrix.format not in ("csr", "csc"):
        return matrix.tocsr()  # in memory of its own
    arrays = kept(matrix.data), kept(matrix.indices), kept(matrix.indptr)
    return type(matrix)(arrays, shape=matrix.shape)


def is_scipys_product() -> bool:
    """Whether the code that asks for an array is SciPy's product with a sparse matrix.

    It takes a 0-d array of objects as the answer that the other factor is no array, and then leaves the product to it.
    """
    code, _ = caller()
    return code.co_name == _SCIPYS_PRODUCT
