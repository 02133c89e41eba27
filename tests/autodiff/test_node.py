"""The recorded value: how it stands in for an array."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest

from gpu_adam import DeviceError, Variable
from gpu_adam import np as on_device
from gpu_adam.autodiff import value_and_grad
from gpu_adam.autodiff.node import Node
from gpu_adam.devices import Device


@pytest.fixture
def x(device: Device) -> Variable:
    return Variable(np.array([[1.0, 2.0], [3.0, 4.0]]), name="x")


def recorded(x: Variable, use: Any) -> Any:
    """What `use` returns for the recorded x."""
    kept = []

    def loss() -> Any:
        kept.append(use(+x))
        return np.sum(x)

    value_and_grad(loss, x)
    return kept[0]


def test_looks_like_an_array(device: Device, x: Variable) -> None:
    assert recorded(x, lambda n: (n.shape, n.dtype, n.ndim, n.size, n.itemsize, n.nbytes, len(n))) == (
        (2, 2), np.float64, 2, 4, 8, 32, 2,
    )  # fmt: skip
    assert recorded(x, lambda n: (np.shape(n), np.ndim(n), np.size(n))) == ((2, 2), 2, 4)


def test_comparisons_are_plain_arrays(device: Device, x: Variable) -> None:
    assert type(recorded(x, lambda n: n > 2)) is device.xp.ndarray
    assert recorded(x, lambda n: (n == x.value).all() and not (n != x.value).any() and bool(n[0, 0] < 2))
    assert recorded(x, lambda n: (n <= 4).all() and (n >= 1).all() and (n > 1).any())


def test_questions_are_plain(device: Device, x: Variable) -> None:
    for use in (np.argmax, lambda n: n.argmax(), np.isnan, np.floor, np.zeros_like, np.argsort, lambda n: n.round()):
        assert not isinstance(recorded(x, use), Node)
    assert recorded(x, lambda n: n.astype(int)).dtype == int


def test_printing_shows_the_value(device: Device, x: Variable) -> None:
    assert recorded(x, lambda n: f"{n[0, 1]:.2f}") == "2.00"
    assert recorded(x, repr) == f"Node({x.value!r})"


@pytest.mark.parametrize("convert", [np.asarray, lambda n: np.array([n, n]), np.from_dlpack])
def test_becoming_an_array_would_cut_the_gradient(device: Device, x: Variable, convert: Any) -> None:
    with pytest.raises(TypeError, match=r"must not become .*numpy\.stack.*\.value"):
        recorded(x, convert)


@pytest.mark.parametrize("convert", [float, int, complex, math.sin, lambda n: n.item()])
def test_becoming_a_number_would_cut_the_gradient(device: Device, x: Variable, convert: Any) -> None:
    with pytest.raises(TypeError, match="must not become"):
        recorded(x, lambda n: convert(n[0, 0]))


def test_rounding_gives_numbers(device: Device, x: Variable) -> None:
    """In Python's way too; they have no gradient, and a loss may decide by them."""
    ratio, steps = Variable(np.array(2.718)), Variable(np.array(7))
    for value in (lambda: ratio, lambda: ratio * 1):
        (a, b), gradient = value_and_grad(lambda: (ratio * round(value()), ratio * round(value(), 1)), ratio)  # noqa: B023
        assert (float(a), float(b), float(gradient)) == pytest.approx((2.718 * 3, 2.718 * 2.7, 3 + 2.7))
    value, _ = value_and_grad(lambda: ratio * round(steps, -1), ratio)
    assert float(value) == pytest.approx(27.18)
    with pytest.raises(TypeError, match=r"one number \(got an array of shape \(2, 2\)\); use numpy.round"):
        recorded(x, round)


@pytest.mark.parametrize("name", ["tolist", "tobytes", "fill", "sort", "flags"])
def test_attributes_of_arrays_alone(device: Device, x: Variable, name: str) -> None:
    """They are missing, as hasattr says, until the loss is over; the sentence says what there is instead."""
    for use in (lambda n: getattr(n, name), lambda n: getattr(x, name)):
        with pytest.raises(AttributeError, match=rf"no attribute '{name}' inside a loss; .*\.value\.{name}"):
            recorded(x, use)
    assert recorded(x, lambda n: not hasattr(n, name) and hasattr(n.value, name))
    kept = recorded(x, lambda n: n * 2)
    assert kept.tolist() == [[2, 4], [6, 8]]
    assert hasattr(kept, name)


def test_attributes_of_nothing(device: Device, x: Variable) -> None:
    for use in (lambda n: n.tolst, lambda n: n.__array_interface__, lambda n: (n.get, x)[device.xp is np]):
        with pytest.raises(AttributeError, match=r"has no attribute"):
            recorded(x, use)
    with pytest.raises(AttributeError, match=r"has no attribute 'tolst'$"):
        recorded(x, lambda n: n).tolst  # noqa: B018


def test_flat_is_a_vector(device: Device, x: Variable) -> None:
    _, gradient = value_and_grad(lambda: sum(x.flat) * 2 + (x * 3).flat[1], x)
    assert gradient.tolist() == [[2, 5], [2, 2]]


def test_views_other_than_of_complex_numbers_are_refused(device: Device, x: Variable) -> None:
    for dtype in (np.int64, np.float32, np.complex64, np.ndarray):
        with pytest.raises(NotImplementedError, match="A view of float64 as"):
            recorded(x, lambda n: n.view(dtype))  # noqa: B023
    with pytest.raises(NotImplementedError, match="the argument type="):
        recorded(x, lambda n: n.view(type=np.ndarray))
    with pytest.raises(TypeError, match="nothing else shows"):
        recorded(x, lambda n: (n * 1).view().__iadd__(1))


def test_is_a_constant_after_the_loss(device: Device, x: Variable) -> None:
    kept = recorded(x, lambda n: n * 2)
    assert type(kept) is Node
    assert np.asarray(kept.value.get() if hasattr(kept.value, "get") else kept).tolist() == [[2, 4], [6, 8]]
    assert float(kept[0, 0]) == 2
    assert type(kept + 1) is device.xp.ndarray
    _, gradient = value_and_grad(lambda: np.sum(x * kept), x)
    assert gradient.tolist() == [[2, 4], [6, 8]]


def test_cannot_be_written_to(device: Device, x: Variable) -> None:
    with pytest.raises(TypeError, match=r"must not be written to.*numpy\.where"):
        recorded(x, lambda n: n.__setitem__(0, 1))
    with pytest.raises(NotImplementedError, match=r"numpy\.add with the argument out="):
        recorded(x, lambda n: np.add(n, 1, out=np.zeros((2, 2))))


def centre(array: Any) -> None:
    array -= array.mean()


IN_PLACE: dict[str, Any] = {
    "for its effect": lambda y, w: centre(y),
    "one after the other": lambda y, w: [y.__iadd__(w), y.__imul__(w), y.__itruediv__(2), y.__ipow__(2)],
    "with a constant": lambda y, w: [y.__isub__([1.0, 2.0]), y.__imod__(1.5)],
    "with itself": lambda y, w: [y.__imul__(y), y.__iadd__(y)],
    "with a matrix": lambda y, w: y.__imatmul__(w),
    "after other uses": lambda y, w: [y * 1, np.exp(y), y.__iadd__(w)],
    "by a constant": lambda y, w: y.__ifloordiv__(1.5),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operators_mean_what_they_do_in_numpy(device: Device, x: Variable, name: str) -> None:
    """Every name of the array has the result; what was computed before has not."""
    start = x.numpy() / 3

    def loss(w: Any) -> Any:
        y = w * 2
        before, alias = y**2, y
        IN_PLACE[name](y, w)
        return np.sum(before * 3) + np.sum(alias**2) + np.sum(y * w)

    found = Variable(start)
    value, gradient = value_and_grad(lambda: loss(found), found)
    assert float(value) == pytest.approx(float(loss(start.copy())))
    step, expected = 1e-6, np.zeros_like(start)
    for index in np.ndindex(start.shape):
        delta = np.zeros_like(start)
        delta[index] = step
        expected[index] = (loss(start + delta) - loss(start - delta)) / (2 * step)
    np.testing.assert_allclose(device.numpy(gradient), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "use",
    [
        lambda n: [n[:1].__iadd__(1)],
        lambda n: [n.T.__iadd__(1)],
        lambda n: [n.reshape(4), n.__iadd__(1)],
        lambda n: [n[0], n[1], n.__iadd__(1)],
        lambda n: [n.real.__iadd__(1)],
        lambda n: [n.astype(n.dtype).__iadd__(1)],
    ],
)
def test_in_place_operators_refuse_arrays_that_share_memory(device: Device, x: Variable, use: Any) -> None:
    with pytest.raises(TypeError, match=r"must change an array that nothing else shows .*; write a = a \+ b"):
        recorded(x, lambda n: use(n * 1))


def test_in_place_operators_refuse_variables_and_other_shapes_and_dtypes(device: Device, x: Variable) -> None:
    with pytest.raises(TypeError, match=r"nothing else shows \(got a variable"):
        recorded(x, lambda n: on_device.asarray(x).__iadd__(1))
    with pytest.raises(ValueError, match=r"must keep the shape \(2,\) \(got a result of shape \(2, 2\)\)"):
        recorded(x, lambda n: (n[0] * 1).__iadd__(n))
    with pytest.raises(TypeError, match=r"must keep the dtype float64 \(got a result of dtype complex128\)"):
        recorded(x, lambda n: (n * 1).__imul__(1j))
    narrow = Variable(np.ones(2, np.float32))
    assert recorded(narrow, lambda n: (n * 1).__imul__(np.ones(2, like=narrow))).dtype == np.float32


def test_copies_are_recorded(device: Device, x: Variable) -> None:
    for duplicate in (copy.copy, copy.deepcopy, np.copy, lambda n: n.copy()):
        _, gradient = value_and_grad(lambda: np.sum(duplicate(x * 2) * 3), x)  # noqa: B023
        assert gradient.tolist() == [[6, 6], [6, 6]]
        original = recorded(x, lambda n: (m := n * 1, duplicate(m).__iadd__(1))[0])  # noqa: B023
        assert original.value.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(TypeError, match="must not become a pickle"):
        recorded(x, pickle.dumps)
    kept = recorded(x, lambda n: n * 2)
    if device.xp is np:
        assert pickle.loads(pickle.dumps(kept)).tolist() == [[2, 4], [6, 8]]


def test_in_place_operators_rebind_numbers(device: Device, x: Variable) -> None:
    def loss() -> Any:
        total = 0.0
        total += np.sum(x)
        total *= 3
        return total

    value, gradient = value_and_grad(loss, x)
    assert value == 30
    assert gradient.tolist() == [[3, 3], [3, 3]]


def test_mixes_with_arrays_and_numpy_numbers_on_either_side(device: Device, x: Variable) -> None:
    host = np.array([[1.0, 1.0], [2.0, 2.0]])
    array = device.array(host)
    factors: Any = [1, 2]
    loss = lambda: np.sum(array * x - np.float64(2) * x + x @ array - array @ x + factors * x / np.int64(2))  # noqa: E731
    value, gradient = value_and_grad(loss, x)
    start = x.numpy()
    assert value == (host * start - 2 * start + start @ host - host @ start + np.array([1, 2]) * start / 2).sum()
    expected = host - 2 + host.sum(1) - host.sum(0)[:, None] + [0.5, 1]
    np.testing.assert_allclose(device.numpy(gradient), expected)


def test_cannot_be_hashed_or_iterated_without_axes(device: Device, x: Variable) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        recorded(x, hash)
    with pytest.raises(TypeError, match="iteration over a 0-d array"):
        recorded(x, lambda n: list(n.sum()))


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (np.linalg.tensorinv, r"numpy\.linalg\.tensorinv"),
        (lambda n: np.partition(n, 1), r"numpy\.partition"),
        (np.ediff1d, r"numpy\.ediff1d"),
        (np.subtract.reduce, r"numpy\.subtract\.reduce"),
        (np.divide.accumulate, r"numpy\.divide\.accumulate"),
        (lambda n: np.add.reduceat(n, [0]), r"numpy\.add\.reduceat"),
        (lambda n: np.add.at(n, 0, 1), r"numpy\.add\.at"),
        (lambda n: np.sum(n, where=n), r"numpy\.sum with respect to the argument where="),
        (lambda n: np.diff(n, prepend=0), r"numpy\.diff with the argument prepend="),
        (lambda n: np.clip(1.0, n, 2.0) + np.power(2.0, n, n), r"numpy\.power with respect to argument 2|pow"),
    ],
)
def test_missing_operations_are_named_with_the_ways_out(device: Device, x: Variable, use: Any, name: str) -> None:
    with pytest.raises((NotImplementedError, TypeError), match=name):
        recorded(x, use)


def test_ways_out(device: Device, x: Variable) -> None:
    with pytest.raises(NotImplementedError, match=r"numpy\.ediff1d has no derivative.*register_vjp.*grad_fn"):
        recorded(x, np.ediff1d)


# -- cupy functions


def kernel(name: str) -> Any:
    def ufunc(*args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if hasattr(arg, "__cupy_override_elementwise_kernel__"):
                return arg.__cupy_override_elementwise_kernel__(ufunc, *args, **kwargs)
        raise AssertionError("nothing recorded")

    ufunc.name = name  # type: ignore[attr-defined]
    return ufunc


def test_elementwise_functions_record(device: Device, x: Variable) -> None:
    sine, add = kernel("cupy_sin"), kernel("cupy_add")
    _, gradient = value_and_grad(lambda: np.sum(add(sine(+x), 1.0)), x)
    np.testing.assert_allclose(device.numpy(gradient), np.cos(x.numpy()))


def test_unknown_kernel(device: Device, x: Variable) -> None:
    with pytest.raises(NotImplementedError, match=r"cupy\.my_kernel.*register_vjp"):
        recorded(x, kernel("my_kernel"))


def test_functions_of_the_real_cupy(device: Device, x: Variable) -> None:
    """Those that gpu_adam/README.md names; the others raise TypeError."""
    cupy = pytest.importorskip("cupy")

    def loss(module: Any) -> Any:
        y = +x
        chosen = module.where(x.value > 2, module.reshape(y, (2, 2)), 0.0)
        total = module.sum(chosen * module.transpose(y) + module.clip(y, 1.5, 3) ** 2)
        for name in ("sin", "exp", "abs", "conj", "square", "copy", "ravel", "squeeze", "flip", "rot90", "diagonal"):
            total = total + module.sum(getattr(module, name)(y) ** 2)
        for name in ("sum", "mean", "prod", "max", "min", "var", "std"):
            reduce = getattr(module, name)
            total = total + reduce(y) + reduce(y, axis=1)[0] + reduce(y, axis=0, keepdims=True)[0, 0]
        total = total + module.sum(module.maximum(y, 2.0) * module.swapaxes(y, 0, 1)) + module.trace(y)
        return total + module.sum(module.take(y, 1, axis=0) + module.repeat(y, 2, axis=0)[3]) + module.linalg.norm(y)

    found, expected = value_and_grad(lambda: loss(cupy), x)[1], value_and_grad(lambda: loss(np), x)[1]
    np.testing.assert_array_equal(device.numpy(found), device.numpy(expected))


@pytest.mark.parametrize(
    "call", [lambda xp, y: xp.concatenate([y, y]), lambda xp, y: xp.fft.fft2(y), lambda xp, y: xp.matmul(y, y)]
)
def test_functions_that_do_not_record_raise(device: Device, x: Variable, call: Any) -> None:
    """CuPy's do not, and so cut no gradient off."""
    try:
        assert type(recorded(x, lambda n: call(device.xp, n))) is Node
    except (TypeError, AttributeError, DeviceError):  # the last one where CuPy lacks a library
        assert device.xp is not np
