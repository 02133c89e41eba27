"""The recorded value: how it stands in for an array."""

import math
from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.autodiff.node import Node


@pytest.fixture
def x() -> Variable:
    return Variable(np.array([[1.0, 2.0], [3.0, 4.0]]), name="x")


def recorded(x: Variable, use: Any) -> Any:
    """What `use` returns for the recorded x."""
    kept = []

    def loss() -> Any:
        kept.append(use(+x))
        return np.sum(x)

    value_and_grad(loss, x)
    return kept[0]


def test_looks_like_an_array(x: Variable) -> None:
    assert recorded(x, lambda n: (n.shape, n.dtype, n.ndim, n.size, n.itemsize, n.nbytes, len(n))) == (
        (2, 2), np.float64, 2, 4, 8, 32, 2,
    )  # fmt: skip
    assert recorded(x, lambda n: (np.shape(n), np.ndim(n), np.size(n))) == ((2, 2), 2, 4)


def test_comparisons_are_plain_arrays(x: Variable) -> None:
    assert type(recorded(x, lambda n: n > 2)) is np.ndarray
    assert recorded(x, lambda n: (n == x.value).all() and not (n != x.value).any() and bool(n[0, 0] < 2))
    assert recorded(x, lambda n: (n <= 4).all() and (n >= 1).all() and (n > 1).any())


def test_questions_are_plain(x: Variable) -> None:
    for use in (np.argmax, lambda n: n.argmax(), np.isnan, np.floor, np.zeros_like, np.argsort, lambda n: n.round()):
        assert not isinstance(recorded(x, use), Node)
    assert recorded(x, lambda n: n.astype(int)).dtype == int


def test_printing_shows_the_value(x: Variable) -> None:
    assert recorded(x, lambda n: f"{n[0, 1]:.2f}") == "2.00"
    assert recorded(x, repr) == f"Node({x.value!r})"


@pytest.mark.parametrize("convert", [np.asarray, lambda n: np.array([n, n]), np.from_dlpack])
def test_becoming_an_array_would_cut_the_gradient(x: Variable, convert: Any) -> None:
    with pytest.raises(TypeError, match=r"must not become .*numpy\.stack.*\.value"):
        recorded(x, convert)


@pytest.mark.parametrize("convert", [float, int, complex, math.sin, lambda n: n.item()])
def test_becoming_a_number_would_cut_the_gradient(x: Variable, convert: Any) -> None:
    with pytest.raises(TypeError, match="must not become"):
        recorded(x, lambda n: convert(n[0, 0]))


def test_is_a_constant_after_the_loss(x: Variable) -> None:
    kept = recorded(x, lambda n: n * 2)
    assert type(kept) is Node
    assert np.asarray(kept).tolist() == [[2, 4], [6, 8]]
    assert float(kept[0, 0]) == 2
    assert type(kept + 1) is np.ndarray
    _, gradient = value_and_grad(lambda: np.sum(x * kept), x)
    assert gradient.tolist() == [[2, 4], [6, 8]]


def test_cannot_be_written_to(x: Variable) -> None:
    with pytest.raises(TypeError, match=r"must not be written to.*numpy\.where"):
        recorded(x, lambda n: n.__setitem__(0, 1))
    with pytest.raises(NotImplementedError, match=r"numpy\.add with the argument out="):
        recorded(x, lambda n: np.add(n, 1, out=np.zeros((2, 2))))


def test_in_place_operators_rebind(x: Variable) -> None:
    def loss() -> Any:
        total = 0.0
        total += np.sum(x)
        total *= 3
        return total

    value, gradient = value_and_grad(loss, x)
    assert value == 30
    assert gradient.tolist() == [[3, 3], [3, 3]]


def test_mixes_with_arrays_and_numpy_numbers_on_either_side(x: Variable) -> None:
    array = np.array([[1.0, 1.0], [2.0, 2.0]])
    factors: Any = [1, 2]
    loss = lambda: np.sum(array * x - np.float64(2) * x + x @ array - array @ x + factors * x / np.int64(2))  # noqa: E731
    value, gradient = value_and_grad(loss, x)
    expected = array * x.value - 2 * x.value + x.value @ array - array @ x.value + np.array([1, 2]) * x.value / 2
    assert value == expected.sum()
    np.testing.assert_allclose(gradient, array - 2 + array.sum(1) - array.sum(0)[:, None] + [0.5, 1])


def test_cannot_be_hashed_or_iterated_without_axes(x: Variable) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        recorded(x, hash)
    with pytest.raises(TypeError, match="iteration over a 0-d array"):
        recorded(x, lambda n: list(n.sum()))


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (np.linalg.svd, r"numpy\.linalg\.svd"),
        (np.median, r"numpy\.median"),
        (np.cumprod, r"numpy\.cumprod"),
        (lambda n: n.cumprod(), r"numpy\.cumprod"),
        (lambda n: np.subtract.outer(n, n), r"numpy\.subtract\.outer"),
        (lambda n: np.add.at(n, 0, 1), r"numpy\.add\.at"),
        (lambda n: np.sum(n, where=n > 1), r"numpy\.sum with the argument where="),
        (lambda n: np.diff(n, prepend=0), r"numpy\.diff with the argument prepend="),
        (lambda n: np.clip(1.0, n, 2.0) + np.power(2.0, n, n), r"numpy\.power with respect to argument 2|pow"),
    ],
)
def test_missing_operations_are_named_with_the_ways_out(x: Variable, use: Any, name: str) -> None:
    with pytest.raises((NotImplementedError, TypeError), match=name):
        recorded(x, use)


def test_ways_out(x: Variable) -> None:
    with pytest.raises(NotImplementedError, match=r"numpy\.median has no derivative.*register_vjp.*grad_fn"):
        recorded(x, np.median)


# -- cupy functions


def kernel(name: str) -> Any:
    def ufunc(*args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if hasattr(arg, "__cupy_override_elementwise_kernel__"):
                return arg.__cupy_override_elementwise_kernel__(ufunc, *args, **kwargs)
        raise AssertionError("nothing recorded")

    ufunc.name = name  # type: ignore[attr-defined]
    return ufunc


def test_elementwise_functions_record(x: Variable) -> None:
    sine, add = kernel("cupy_sin"), kernel("cupy_add")
    _, gradient = value_and_grad(lambda: np.sum(add(sine(+x), 1.0)), x)
    np.testing.assert_allclose(gradient, np.cos(x.value))


def test_unknown_kernel(x: Variable) -> None:
    with pytest.raises(NotImplementedError, match=r"cupy\.my_kernel.*register_vjp"):
        recorded(x, kernel("my_kernel"))


def test_functions_of_the_real_cupy(x: Variable) -> None:
    cupy = pytest.importorskip("cupy")
    if getattr(cupy, "__emulated__", False):
        pytest.skip("the emulation has no such hook")

    def loss(module: Any) -> Any:
        y = +x
        chosen = module.where(x.value > 2, module.reshape(y, (2, 2)), 0.0)
        total = module.sum(chosen * module.transpose(y) + module.clip(y, 1.5, 3) ** 2)
        for name in ("sin", "exp", "abs", "conj", "square"):
            total = total + module.sum(getattr(module, name)(y))
        for name in ("sum", "mean", "prod", "max", "var", "std"):
            reduce = getattr(module, name)
            total = total + reduce(y) + reduce(y, axis=1)[0] + reduce(y, axis=0, keepdims=True)[0, 0]
        return total

    np.testing.assert_array_equal(value_and_grad(lambda: loss(cupy), x)[1], value_and_grad(lambda: loss(np), x)[1])
