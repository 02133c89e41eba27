"""The derivative of numpy.einsum: for each operand another einsum, of the gradient with the other operands."""

from typing import Any

import numpy as np

from gpu_adam.autodiff.rules import Each, Operand, Primitive, composed, conj, plain

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def explicit(subscripts: str, ndims: list[int]) -> tuple[list[str], str]:
    """The terms of the operands and of the result, without spaces, ellipses and implied parts."""
    left, arrow, right = subscripts.replace(" ", "").partition("->")
    terms = left.split(",")
    unused = [letter for letter in _LETTERS if letter not in left]
    hidden = [ndim - len(term.replace("...", "")) if "..." in term else 0 for term, ndim in zip(terms, ndims)]  # noqa: B905  # einsum itself tells a wrong number of operands
    longest = "".join(unused[: max(hidden)])
    terms = [term.replace("...", longest[len(longest) - n :]) for term, n in zip(terms, hidden)]  # noqa: B905
    if arrow:
        return terms, right.replace("...", longest)
    joined = "".join(terms)
    return terms, longest + "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c not in longest))


def _einsum(*args: Any, terms: list[str], result: str, optimize: Any = False) -> Any:
    return np.einsum(f"{','.join(terms)}->{result}", *args, optimize=optimize)


def _einsum_vjp(position: int, g: Any, y: Any, *args: Any, terms: list[str], result: str, optimize: Any = False) -> Any:
    own = terms[position]
    others = [(term, conj(a)) for i, (term, a) in enumerate(zip(terms, args, strict=True)) if i != position]
    inputs = [(result, g), *others]
    target = own
    sizes = dict(zip(own, args[position].shape, strict=True))
    # A letter twice in the operand: a diagonal was taken, and the gradient lives on it.
    spare = iter(c for c in _LETTERS if c not in "".join(terms))
    for letter in sorted({c for c in own if own.count(c) > 1}):
        for i in [i for i, c in enumerate(own) if c == letter][1:]:
            twin = next(spare)
            target = target[:i] + twin + target[i + 1 :]
            numbers = np.arange(sizes[letter], like=args[position])
            # Not numpy.eye: it passes `device`, which CuPy's does not take.
            inputs.append((letter + twin, (numbers[:, None] == numbers).astype(g.real.dtype)))
    # A letter nowhere else was summed over: every element along it gets the same.
    known = "".join(term for term, _ in inputs)
    present = "".join(c for c in target if c in known)
    found = np.einsum(f"{','.join(term for term, _ in inputs)}->{present}", *(a for _, a in inputs), optimize=optimize)
    if present == target:
        return found
    missing = tuple(i for i, c in enumerate(target) if c not in known)
    return np.expand_dims(found, missing) + np.zeros_like(args[position])


_recorded_einsum = Primitive(_einsum, Each(_einsum_vjp), of=np.einsum)


@composed(np.einsum)
def _einsum_entry(*operands: Operand, out: Any = None, optimize: Any = False) -> Any:
    subscripts, *arrays = operands
    if not isinstance(subscripts, str):
        raise TypeError(
            "numpy.einsum of recorded arrays takes its subscripts as a string "
            f"(got {type(plain(subscripts)).__name__}); write them as 'ij,jk->ik'."
        )
    terms, result = explicit(subscripts, [np.ndim(plain(a)) for a in arrays])
    return _recorded_einsum(tuple(arrays), {"terms": terms, "result": result, "optimize": optimize})
