"""What a loss computes with and does not record: the backward pass reads what the loss read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_adam import ArgumentValueError, Variable
from gpu_adam.autodiff import constants, register_vjp, value_and_grad
from gpu_adam.autodiff.constants import Constants
from gpu_adam.devices import Device


@pytest.fixture
def w(device: Device) -> Variable:
    return Variable(np.array([1.0, 2.0, 3.0]), name="w")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array counts as too large to be copied."""
    monkeypatch.setattr(constants, "COPIED_BYTES", -1)
    monkeypatch.setattr("gpu_adam.autodiff.rules.COPIED_BYTES", -1)
    monkeypatch.setattr(constants, "COPIED_DEVICE_BYTES", -1)


# An operation with a constant that its derivative reads, by what the constant is filled with; all sum to 3 w.
scaled = register_vjp(lambda x, factor: x * factor, lambda g, y, x, factor: g * factor, None)
by_keyword = register_vjp(lambda x, *, factor: x * factor, lambda g, y, x, *, factor: g * factor)
USES: dict[str, Callable[[Any, Any], Any]] = {
    "product": lambda w, c: w * c,
    "product from the left": lambda w, c: c * w,
    "quotient": lambda w, c: w / np.reciprocal(c),
    "matmul": lambda w, c: w @ c,
    "dot": lambda w, c: np.dot(c, w),
    "einsum": lambda w, c: np.einsum("i,i->i", w, c),
    "view": lambda w, c: w * c[:],
    "transposed": lambda w, c: w * c.T,
    "own function": scaled,
    "keyword": lambda w, c: by_keyword(w, factor=c),
}


@pytest.mark.parametrize("use", USES)
def test_a_buffer_that_is_filled_again(device: Device, w: Variable, use: str) -> None:
    buffer = device.array(np.empty(3))

    def loss() -> Any:
        total: Any = 0.0
        for k in (1.0, 2.0):
            buffer[:] = k
            total = total + np.sum(USES[use](w, buffer))
        return total

    _, gradient = value_and_grad(loss, w)
    np.testing.assert_allclose(device.numpy(gradient), [3, 3, 3])


@pytest.mark.parametrize(
    "use",
    [
        lambda w, mask: np.where(mask, w, 0),
        lambda w, mask: np.where(mask, 0, -w) + w,
        lambda w, mask: w[mask],
        lambda w, mask: w[(mask,)],
    ],
)
def test_a_mask_that_is_filled_again(device: Device, w: Variable, use: Any) -> None:
    mask = device.array(np.zeros(3, bool))

    def loss() -> Any:
        total: Any = 0.0
        for k in range(3):
            mask[:] = False
            mask[k] = True
            total = total + (k + 1) * np.sum(use(w, mask))
        return total

    _, gradient = value_and_grad(loss, w)
    assert gradient.tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", [list, np.array])
@pytest.mark.parametrize("use", [lambda w, i: w[i], np.take, lambda w, i: w[(i,)]])
def test_indices_that_are_written_again(w: Variable, kind: Any, use: Any) -> None:
    index: Any = kind([0, 1])

    def loss() -> Any:
        first = np.sum(use(w, index))
        index[:] = kind([2, 2])
        return first + np.sum(+w) * 0

    _, gradient = value_and_grad(loss, w)
    assert gradient.tolist() == [1, 1, 0]


def test_the_array_of_a_variable(device: Device, w: Variable) -> None:
    """On the host it cannot be written to, on a CUDA device it is a copy; after the loss it is the live one again."""
    other = Variable(np.ones(3), name="other")
    for variable in (w, other):

        def loss(variable: Variable = variable) -> Any:
            result = np.sum(w * w * other)
            variable.value[...] = 5
            return result

        if device.xp is np:
            with pytest.raises(ValueError, match="read-only"):
                value_and_grad(loss, w)
        else:
            assert value_and_grad(loss, w)[1].tolist() == [2, 4, 6]
        assert (w.value.tolist(), other.value.tolist()) == ([1, 2, 3], [1, 1, 1])
        variable.value[0] = 1
        assert variable.value is variable.value


def test_the_array_of_a_recorded_value(device: Device, w: Variable) -> None:
    def loss() -> Any:
        squared = w * w
        result = np.sum(squared * squared)
        squared.value[...] = 5
        return result

    if device.xp is np:
        with pytest.raises(ValueError, match="read-only"):
            value_and_grad(loss, w)
    else:
        assert value_and_grad(loss, w)[1].tolist() == [4, 32, 108]


def test_views_of_variables_without_gradient_cannot_be_written_to(w: Variable) -> None:
    other = Variable(np.ones(3), device="host")
    with pytest.raises(ValueError, match="read-only"):
        value_and_grad(lambda: other[1:].__setitem__(0, 2.0), w)
    assert other.numpy().tolist() == [1, 1, 1]


# -- large ones
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("kind", [lambda a: a, lambda a: a.T, lambda a: a[::2], lambda a: a[:, ::2], lambda a: a[:1]])
@pytest.mark.parametrize("values", [(1.0, 2.0), (1.0, 2.0, 1.0)], ids=["once", "and back"])
def test_a_large_one_that_changes_is_an_error_or_copied(device: Device, kind: Any, values: Any) -> None:
    buffer, w = device.array(np.empty((60, 60))), Variable(np.ones(()), name="w")

    def loss() -> Any:
        total: Any = 0.0
        for value in values:
            buffer[...] = value
            total = total + np.sum(kind(buffer) * w)
        return total

    part = kind(buffer)
    if part.flags.c_contiguous or part.flags.f_contiguous:
        with pytest.raises(ArgumentValueError, match=r"must not change .*by numpy\.multiply in ") as caught:
            value_and_grad(loss, w)
        assert f'"{__file__}", line {loss.__code__.co_firstlineno + 4}, in loss' in str(caught.value)
    else:
        _, gradient = value_and_grad(loss, w)
        assert float(gradient) == sum(values) * part.size


@pytest.mark.usefixtures("large")
def test_a_large_one_that_stays_is_not_copied(device: Device, w: Variable) -> None:
    kept, array = Constants(), device.array(np.ones((70, 50)))
    for same in (array, array.T):
        assert kept.kept(same, np.add) is same
    kept.check()
    _, gradient = value_and_grad(lambda: np.sum(w * array[0, :3] * array[1, :3]), w)
    assert gradient.tolist() == [1, 1, 1]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "one bit": lambda a: a.view(np.uint64).__setitem__(1234, a.view(np.uint64)[1234] ^ 1),
    "the last element": lambda a: a.__setitem__(-1, 0.5),
    "two elements of a row change places": lambda a: a.__setitem__([10, 20], a[[20, 10]]),
    "two elements change places": lambda a: a.__setitem__([10, 2000], a[[2000, 10]]),
    "two elements a row apart change places": lambda a: a.__setitem__([10, 1031], a[[1031, 10]]),
    "all change places": lambda a: np.random.default_rng(0).shuffle(a),
    "halves change places": lambda a: a.__setitem__(slice(None), np.roll(a, len(a) // 2)),
    "a sign of zero": lambda a: a.__setitem__(5, -a[5]),
}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: str) -> None:
    kept, array = Constants(), np.random.default_rng(1).random(5003)
    array[5] = 0.0
    kept.kept(array, np.add)
    kept.check()
    before = array.tobytes()
    CHANGES[change](array)
    assert array.tobytes() != before
    with pytest.raises(ArgumentValueError, match="must not change"):
        kept.check()


@pytest.mark.usefixtures("large")
def test_what_cannot_be_written_is_neither_copied_nor_watched(tmp_path: Path) -> None:
    kept, frozen = Constants(), np.ones(5000)
    frozen.flags.writeable = False
    np.ones(5000).tofile(tmp_path / "data")
    mapped = np.memmap(tmp_path / "data", np.float64, "r")
    of_bytes = np.frombuffer(bytes(5000))
    own = Variable(np.ones(5000), device="host")
    shown = kept.of_variable(own._value)
    for array in (frozen, mapped, of_bytes, shown, shown[5:]):
        assert kept.kept(array, np.add) is array
    assert kept._watched == {}
    base = np.ones(5000)
    for array in (np.broadcast_to(base, (2, 5000)), np.diagonal(np.ones((70, 70))), base.view()):
        array = array.view()  # noqa: PLW2901
        array.flags.writeable = False
        assert kept.kept(array, np.add) is not array or kept._watched


@pytest.mark.usefixtures("large")
def test_a_broadcast_one_is_not_made_large() -> None:
    base = np.ones(3)
    found = Constants().kept(np.broadcast_to(base, (1000, 3)), np.add)
    assert found.shape == (1000, 3)
    assert found.strides[0] == 0
    assert not np.shares_memory(found, base)


def test_what_no_rule_reads_is_not_kept(device: Device, w: Variable) -> None:
    """A sum's derivative reads none of its operands."""
    array, seen = device.array(np.ones(3)), list[Any]()

    def loss() -> Any:
        result = np.sum(np.concatenate([(w + array) - array, array]) + np.where(w.value > 0, 1.0, array)[0])
        seen.extend(value for node in result.tape.nodes for value in node.origin[1])
        return result

    value_and_grad(loss, w)
    assert sum(value is array for value in seen if type(value) is type(array)) == 3
