"""Products with SciPy's sparse matrices: gradients of the same products written out, and refusals."""

from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import constants, value_and_grad
from gpu_adam.errors import ArgumentValueError

from .cases import random

sparse = pytest.importorskip("scipy.sparse")

FORMATS = ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")
KINDS = [f"{name}_{kind}" for name in FORMATS for kind in ("array", "matrix")]
PRODUCTS = {
    "a @ w": lambda a, w: a @ w,
    "a @ (w + 0)": lambda a, w: a @ (w + 0),
    "w @ a": lambda a, w: (w.T @ a.T).T,
    "(w + 0) @ a": lambda a, w: ((w + 0).T @ a.T).T,
}
STARS = {
    "a * w": lambda a, w: a * w,
    "a * (w + 0)": lambda a, w: a * (w + 0),
    "w * a": lambda a, w: (w.T * a.T).T,
    "(w + 0) * a": lambda a, w: ((w + 0).T * a.T).T,
}


def some(is_complex: bool = False) -> Any:
    """A matrix with zeros in it."""
    dense = random((4, 3), is_complex, "sparse")
    return np.where(np.abs(dense) > 0.5, dense, 0)


def assert_gradient(product: Any, matrix: Any, dense: Any, start: Any) -> None:
    """Of a product, beside that of the matrix written out; the value is that outside of a loss."""
    w = Variable(start)
    weights = random((dense @ start).shape, np.iscomplexobj(dense @ start), "weights")
    value, gradient = value_and_grad(lambda: np.sum((product(matrix, w) * weights).real), w)
    expected = np.conj(dense.T) @ np.conj(weights)
    np.testing.assert_allclose(gradient, expected if np.iscomplexobj(start) else expected.real, rtol=1e-12)
    np.testing.assert_allclose(value, np.sum((product(matrix, w) * weights).real), rtol=1e-12)
    np.testing.assert_allclose(value, np.sum(((dense @ start) * weights).real), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_products(kind: str, shape: tuple[int, ...]) -> None:
    is_matrix = kind.endswith("matrix")
    products = {**PRODUCTS, **(STARS if is_matrix else {})}
    if not kind.startswith("coo"):  # its method takes arrays only
        products["a.dot(w)"] = lambda a, w: a.dot(w)
        products["a.dot(w + 0)"] = lambda a, w: a.dot(w + 0)
    for is_complex in (False, True):
        for of_complex in (False, True):
            dense, start = some(is_complex), random(shape, of_complex, "w")
            for product in products.values():
                assert_gradient(product, getattr(sparse, kind)(dense), dense, start)


@pytest.mark.parametrize("kind", KINDS)
def test_variables_on_the_left(kind: str) -> None:
    """Inside of a loss and outside, where NumPy's functions would make an array of objects."""
    dense, start = some(), random((3,), seed="w")
    assert_gradient(lambda a, w: w @ a.T, getattr(sparse, kind)(dense), dense, start)
    if kind.endswith("matrix"):
        assert_gradient(lambda a, w: w * a.T, getattr(sparse, kind)(dense), dense, start)


def test_single_precision() -> None:
    w = Variable(np.ones(3, np.float32))
    value, gradient = value_and_grad(lambda: np.sum(sparse.csr_array(some().astype(np.float32)) @ w), w)
    assert (value.dtype, gradient.dtype) == (np.float32, np.float32)
    _, gradient = value_and_grad(lambda: np.sum(sparse.csr_array(some()) @ w), w)
    assert gradient.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_that_is_filled_again(kind: str) -> None:
    """The gradient is that of the matrix as it was used."""
    matrix, w = getattr(sparse, kind)(np.eye(3)), Variable(np.ones(3))

    def loss() -> Any:
        total = 0
        for factor in (1.0, 2.0):
            matrix[1, 1] = factor
            total = total + np.sum(matrix @ w)
        return total

    if kind[:3] in ("bsr", "coo", "dia"):  # their elements cannot be assigned

        def loss() -> Any:
            total = np.sum(matrix @ w)
            matrix.data *= 2
            return total

        assert value_and_grad(loss, w)[1].tolist() == [1, 1, 1]
    else:
        assert value_and_grad(loss, w)[1].tolist() == [2, 3, 2]


def test_a_large_matrix_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "COPIED_BYTES", 8)
    matrix, w = sparse.csr_array(np.eye(3)), Variable(np.ones(3))
    _, gradient = value_and_grad(lambda: np.sum(matrix @ w), w)
    assert gradient.tolist() == [1, 1, 1]

    def loss() -> Any:
        total = np.sum(matrix @ w)
        matrix.data[0] = 5
        return total

    with pytest.raises(ArgumentValueError, match="must not change"):
        value_and_grad(loss, w)


@pytest.mark.parametrize(
    "use",
    [
        lambda a, w: a + w,
        lambda a, w: w - a,
        lambda a, w: a.multiply(w),
        lambda a, w: a * w,
        lambda a, w: w * a,
        lambda a, w: w / a,
        np.dot,
        lambda a, w: w.dot(a),
        lambda a, w: np.einsum("ij,j", a, w),
        lambda a, w: np.concatenate([a, w]),
        lambda a, w: sparse.coo_array(np.ones(3)) @ w,
        lambda a, w: np.asarray(w),
    ],
)
def test_what_has_no_rule_is_refused(use: Any) -> None:
    """And an array of objects never passes for a recorded value."""
    w = Variable(np.ones(3))
    with pytest.raises((NotImplementedError, TypeError), match=r"sparse operand|must not become a NumPy array"):
        value_and_grad(lambda: np.sum(use(sparse.csr_array(np.eye(3)), w + 0)), w)
