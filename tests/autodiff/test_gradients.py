"""value_and_grad and gradients: what they take, give back and refuse."""

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_adam import ArgumentTypeError, ArgumentValueError, DeviceError, Variable
from gpu_adam.autodiff import gradients, value_and_grad
from gpu_adam.autodiff_seam import current_tracer
from gpu_adam.devices import Device

from .cases import random


@pytest.fixture
def w(device: Device) -> Variable:
    return Variable(np.array([1.0, 2.0, 3.0]), name="w")


@pytest.fixture
def b(device: Device) -> Variable:
    return Variable(np.array(0.5), name="b")


def test_value_and_gradients(device: Device, w: Variable, b: Variable) -> None:
    value, (gw, gb) = value_and_grad(lambda: np.sum(w * w) * b, [w, b])
    assert (value, gw.tolist(), gb) == (7.0, [1, 2, 3], 14)
    assert type(gb) is device.xp.ndarray
    assert type(value) is type(np.sum(w.value))


def test_on_each_device(device: Device) -> None:
    x = Variable(np.arange(6, dtype=np.float32).reshape(2, 3))
    z = Variable(np.array([1 + 2j, 3], np.complex64))
    value, (gx, gz) = value_and_grad(lambda: np.sum(np.exp(x).mean(axis=0)) + np.sum(np.abs(z) ** 2), [x, z])
    assert type(gx) is type(gz) is type(x.value)
    np.testing.assert_allclose(device.numpy(gx), np.exp(x.numpy()) / 2, rtol=1e-6)
    np.testing.assert_allclose(device.numpy(gz), 2 * z.numpy(), rtol=1e-6)
    assert abs(float(value) - np.exp(x.numpy()).sum() / 2 - 14) < 1e-3


def test_gradients_have_the_structure_of_the_variables(device: Device, w: Variable, b: Variable) -> None:
    _, found = value_and_grad(lambda: np.sum(w) * 2 + b, {"w": w, "more": (b, [w])})
    assert found["w"].tolist() == [2, 2, 2]
    assert found["more"][0] == 1
    assert found["more"][1][0] is found["w"]


def test_pairs_for_the_optimizer(device: Device, w: Variable, b: Variable) -> None:
    _, pairs = gradients(lambda: np.sum(w) * 2 + b, {"z": w, "a": b})
    assert [variable for _, variable in pairs] == [b, w]


def test_variables_may_be_told_after_the_loss(device: Device) -> None:
    made: list[Variable] = []

    def loss() -> Any:
        made.append(Variable(np.ones(2)))
        return np.sum(made[0] * 3)

    _, pairs = gradients(loss, lambda: made)
    assert pairs[0][0].tolist() == [3, 3]
    assert value_and_grad(lambda: np.sum(made[0]), lambda: made)[1][0].tolist() == [1, 1]


def test_loss_is_called_once(device: Device, w: Variable) -> None:
    calls: list[int] = []

    def loss() -> Any:
        calls.append(1)
        return np.sum(w)

    value_and_grad(loss, w)
    assert calls == [1]


def test_losses_are_summed(device: Device, w: Variable, b: Variable) -> None:
    values, (gw, gb) = value_and_grad(lambda: [w * b, np.sum(w), 2 * b, 1.0], [w, b])
    assert gw.tolist() == [1.5, 1.5, 1.5]
    assert gb == 8
    np.testing.assert_array_equal(device.numpy(values[0]), w.numpy() * 0.5)
    assert values[1:] == [6, 1.0, 1.0]


def test_a_variable_may_be_the_loss(device: Device, w: Variable) -> None:
    value, gradient = value_and_grad(lambda: w, w)
    assert value.tolist() == [1, 2, 3]
    assert value is not w.value
    assert gradient.tolist() == [1, 1, 1]


def test_two_backward_passes_agree(device: Device, w: Variable) -> None:
    loss = lambda: np.sum(np.exp(w) * w)  # noqa: E731
    (value, first), (again, second) = value_and_grad(loss, w), value_and_grad(loss, w)
    assert value == again
    np.testing.assert_array_equal(device.numpy(first), device.numpy(second))
    assert first is not second


def test_independent_variables_have_no_gradient(device: Device, w: Variable, b: Variable) -> None:
    assert value_and_grad(lambda: np.sum(w), [w, b])[1][1] is None
    assert value_and_grad(lambda: np.sum(w.value), w) == (6.0, None)
    assert value_and_grad(lambda: 2.5, w) == (2.5, None)
    assert value_and_grad(lambda: np.sum(w) * (np.floor(b) + 1), b)[1] is None


def test_whole_numbers_have_no_gradient(device: Device, w: Variable) -> None:
    n = Variable(np.array([1, 2, 3]), name="n")
    assert value_and_grad(lambda: np.sum(w * n), w)[1].tolist() == [1, 2, 3]
    with pytest.raises(ArgumentTypeError, match=r"^variable 'n' must be of real or complex .* \(got int64\)"):
        value_and_grad(lambda: np.sum(w * n), [w, n])


def test_any_ordered_nesting_of_variables(device: Device, w: Variable) -> None:
    """What can be gone through only once is gone through once."""
    v = Variable(np.ones(3))
    once: list[Any] = [iter([w, v]), (each for each in [w, v]), [iter([w]), (v,)], {"w": w, "v": v}.values()]
    for nesting in [*once, [[w], {"v": v}.values()]]:
        _, found = value_and_grad(lambda: np.sum(2 * w) + np.sum(3 * v), nesting)
        assert [gradient.tolist() for gradient in leaves(found)] == [[2.0] * 3, [3.0] * 3]
    _, found = value_and_grad(lambda: np.sum(2 * w) + np.sum(3 * v), {"b": iter([w]), "a": v})
    assert list(found) == ["a", "b"]


def test_nestings_without_an_order(device: Device, w: Variable) -> None:
    nestings: list[tuple[Any, str]] = [({w}, "in an order"), ({1: w, "v": w}, "keys that can be sorted")]
    for nesting, message in nestings:
        with pytest.raises(ArgumentTypeError, match=f"^var_list must .*{message}"):
            value_and_grad(lambda: np.sum(w), nesting)


def leaves(nested: Any) -> list[Any]:
    return [leaf for item in nested for leaf in leaves(item)] if isinstance(nested, list) else [nested]


def test_gradients_are_arrays_of_their_own(device: Device, w: Variable) -> None:
    for loss in (lambda: np.sum(w), lambda: w, lambda: np.sum(np.broadcast_to(w, (2, 3))), lambda: w[::-1].T):
        _, gradient = value_and_grad(loss, w)
        assert gradient.flags.c_contiguous
        assert getattr(gradient.flags, "writeable", True)  # CuPy's always are
    _, (first, second) = value_and_grad(lambda: w + +w * 1 + v, [w, v := Variable(np.ones(3))])
    assert not np.shares_memory(first, second)
    _, (first, second) = value_and_grad(lambda: v.reshape(1, 3) + u, [v, u := Variable(np.ones((1, 3)))])
    assert not np.shares_memory(first, second)
    m = Variable(np.ones((2, 3)))
    assert value_and_grad(lambda: m.T * np.ones((3, 2), like=m), m)[1].flags.c_contiguous


# -- cotangent
def test_number(device: Device, w: Variable) -> None:
    _, pairs = gradients(lambda: w * w, w, 0.5)
    assert pairs[0][0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", [np.array, list, lambda x: Variable(np.array(x))])
def test_per_element(device: Device, w: Variable, kind: Any) -> None:
    _, pairs = gradients(lambda: w * w, w, kind([1.0, 0.0, -1.0]))
    assert pairs[0][0].tolist() == [2, 0, -6]


def test_list_of_losses(device: Device, w: Variable, b: Variable) -> None:
    _, pairs = gradients(lambda: [np.sum(w), b], [w, b], [2.0, 3.0])
    assert (pairs[0][0].tolist(), pairs[1][0]) == ([2, 2, 2], 3)


def test_makes_complex_losses_possible(device: Device) -> None:
    z = Variable(np.array([1 + 2j]))
    _, pairs = gradients(lambda: 3 * z, z, np.array([1j]))
    assert pairs[0][0].tolist() == [3j]


def test_keeps_the_dtype(device: Device) -> None:
    x = Variable(np.ones(3, np.float32))
    _, pairs = gradients(lambda: x * x, x, np.full(3, 2.0))
    assert pairs[0][0].dtype == np.float32


def test_wrong_shape(device: Device, w: Variable) -> None:
    with pytest.raises(ArgumentValueError, match=r"grad_loss must be a number or have the shape .*\(3,\).*\(2,\)"):
        gradients(lambda: w * w, w, np.ones(2))


def test_wrong_number(device: Device, w: Variable) -> None:
    with pytest.raises(ArgumentValueError, match="one gradient for each loss, 1 in number"):
        gradients(lambda: [w * w], w, [1.0, 2.0])


# -- bad input
@pytest.mark.parametrize("loss", [np.float64(3), "loss", None])
def test_loss_must_be_callable(device: Device, w: Variable, loss: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"loss must be a callable.*is not callable"):
        value_and_grad(loss, w)


@pytest.mark.parametrize(("result", "got"), [("3", "a str"), (None, "None"), ({}, "a dict"), (object(), "a object")])
def test_results_that_are_no_numbers(device: Device, w: Variable, result: Any, got: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"loss\(\) must return real floating-point numbers \(got {got}\)"):
        value_and_grad(lambda: result, w)


@pytest.mark.parametrize("result", [3, True, np.int64(3), np.arange(3)])
def test_whole_numbers(device: Device, w: Variable, result: Any) -> None:
    with pytest.raises(ArgumentValueError, match="no gradients provided"):
        value_and_grad(lambda: result, w)


def test_complex_loss(device: Device) -> None:
    z = Variable(np.ones(2, complex))
    with pytest.raises(ArgumentValueError, match=r"must return real.*complex128.*absolute value"):
        value_and_grad(lambda: np.sum(z), z)


def test_no_loss_at_all(device: Device, w: Variable) -> None:
    with pytest.raises(ArgumentValueError, match="at least one loss"):
        value_and_grad(list, w)


@pytest.mark.parametrize("bad", [None, np.ones(3), "w", 3])
def test_only_variables(device: Device, w: Variable, bad: Any) -> None:
    with pytest.raises(ArgumentValueError, match=r"must hold Variables only \(got an object of type <class"):
        value_and_grad(lambda: np.sum(w), [w, bad])


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda w: w.assign([0, 0, 0]),
        lambda w: w.assign_add([0, 0, 0]),
        lambda w: w.assign_sub([0, 0, 0]),
        lambda w: w.__setitem__(0, 1),
        lambda w: w.__iadd__(1),
    ],
)
def test_overwriting_a_variable(device: Device, w: Variable, overwrite: Any) -> None:
    with pytest.raises(ArgumentValueError, match=r'variable "w" must not be overwritten.*move it out of the loss'):
        value_and_grad(lambda: (np.sum(w * w), overwrite(w))[0], w)
    assert w.value.tolist() == [1, 2, 3]


def test_gradients_of_gradients(device: Device, w: Variable) -> None:
    with pytest.raises(NotImplementedError, match="Gradients of gradients"):
        value_and_grad(lambda: value_and_grad(lambda: np.sum(w), w)[0], w)


def test_an_error_in_the_loss_passes_through_and_leaves_nothing(device: Device, w: Variable) -> None:
    with pytest.raises(ZeroDivisionError):
        value_and_grad(lambda: np.sum(w) / (1 / 0), w)
    assert current_tracer.get() is None
    assert type(np.sum(w)) is type(np.sum(w.value))


def test_threads_do_not_see_each_other(device: Device) -> None:
    if getattr(device.xp, "__emulated__", False):
        pytest.skip("needs a real GPU: an emulated driver keeps account of the memory of one thread")
    variables = [Variable(random((20,), seed=i)) for i in range(4)]
    barrier = threading.Barrier(4)
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        def loss() -> Any:
            barrier.wait(10)
            result = np.sum(np.exp(variables[i]) * variables[0].value)
            barrier.wait(10)
            return result

        found[i] = value_and_grad(loss, variables)[1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        expected = np.exp(variables[i].numpy()) * variables[0].numpy()
        np.testing.assert_allclose(device.numpy(found[i][i]), expected)
        assert [g is None for g in found[i]] == [j != i for j in range(4)]


# -- worker threads
def in_a_thread(function: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize(
    "submitted",
    [lambda pool, f, k: pool.submit(f, k), lambda pool, f, k: pool.submit(contextvars.copy_context().run, f, k)],
    ids=["plainly", "with its context"],
)
def test_terms_of_worker_threads_are_recorded(device: Device, w: Variable, submitted: Any) -> None:
    if getattr(device.xp, "__emulated__", False):
        pytest.skip("needs a real GPU: an emulated driver keeps account of the memory of one thread")
    with ThreadPoolExecutor(3) as pool:  # which is there before the loss

        def loss() -> Any:
            terms = [submitted(pool, lambda k: k * np.sum(w**2), k) for k in (1.0, 3.0, 10.0)]
            return sum(term.result() for term in terms) + np.sum(w)

        _, gradient = value_and_grad(loss, w)
    assert gradient.tolist() == [29, 57, 85]


def test_other_threads_take_the_value(device: Device, w: Variable, b: Variable) -> None:
    """A thread that is no part of the loss: variables of no interest to the loss are plain, and so is `.value`."""
    if getattr(device.xp, "__emulated__", False):
        pytest.skip("needs a real GPU: an emulated driver keeps account of the memory of one thread")
    found: list[Any] = []

    def loss() -> Any:
        found.append(in_a_thread(lambda: (float(np.sum(w.value)), float(b * 2), w.value is w._value)))
        return np.sum(w)

    value_and_grad(loss, w)
    assert found == [(6, 1, True)]
    assert in_a_thread(lambda: float(np.sum(w))) == 6


def test_a_thread_that_could_work_for_two_losses(device: Device, w: Variable) -> None:
    if getattr(device.xp, "__emulated__", False):
        pytest.skip("needs a real GPU: an emulated driver keeps account of the memory of one thread")
    barrier, messages = threading.Barrier(2), list[str]()

    def loss() -> Any:
        barrier.wait(10)
        with pytest.raises(ArgumentValueError, match=r'"w" must not .*of several losses .*copy_context') as error:
            in_a_thread(lambda: np.sum(w))
        messages.append(str(error.value))
        barrier.wait(10)
        return np.sum(w)

    with ThreadPoolExecutor(2) as pool:
        for one in [pool.submit(value_and_grad, loss, w) for _ in range(2)]:
            assert one.result()[1].tolist() == [1, 1, 1]
    assert len(messages) == 2


def test_a_failed_loss_is_over_for_other_threads(device: Device, w: Variable) -> None:
    """Though its exception, and with it the frame of its call, is kept."""
    for variables in (w, lambda: [w]):
        with pytest.raises(ZeroDivisionError) as kept:
            value_and_grad(lambda: np.sum(w) / (1 / 0), variables)
        assert kept.value.__traceback__ is not None
        assert in_a_thread(lambda: float(np.sum(w))) == 6


# -- libraries that a loss lacks
@pytest.mark.parametrize("library", ["libcublasLt.so.13", "libcufft.so.12", "libcusolver.so.12", "libnvJitLink.so.13"])
def test_a_library_of_cupy_that_is_missing(w: Variable, library: str) -> None:
    def loss() -> Any:
        raise ImportError(f'Failure finding "{library}": No such file: {library}')

    sentence = rf'no {library.partition(".")[0]}\b.*pip install "gpu-adam\[cuda13-math\]"'
    with pytest.raises(DeviceError, match=sentence) as caught:
        value_and_grad(loss, w)
    assert isinstance(caught.value.__cause__, ImportError)


def test_other_imports_fail_as_they_are(w: Variable) -> None:
    with pytest.raises(ModuleNotFoundError, match="nonesuch"):
        value_and_grad(lambda: __import__("nonesuch"), w)


def test_the_extra_of_the_message_brings_the_libraries() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for version in ("12", "13"):
        libraries = f"cuda-toolkit[cublas,cufft,cusolver,cusparse]=={version}.*"
        assert f'cuda{version}-math = ["gpu-adam[cuda{version}]", "{libraries}"]' in text
