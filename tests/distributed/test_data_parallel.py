"""Replicated training: the bits of one process, on one rank and on several; ranks that do not train the same thing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from communicators import fake_nccl, jobs

import gpu_adam
from gpu_adam import IndexedSlices, Variable
from gpu_adam.communicators import Alone, Communicator, Nccl
from gpu_adam.devices import Device
from gpu_adam.distributed import DataParallelAdam
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, DistributedError

from . import training
from .threads import on_ranks

TRAINING = """
from distributed import training
from gpu_adam.communicators import Mpi
with Mpi() as communicator:
    training.check(communicator, large={large})
    training.check_default(communicator)
    training.check_accumulated(communicator)
    training.check_accumulated(communicator, accumulation="sum")
    training.check_loss_scale(communicator)
print("done", flush=True)
"""

DISAGREEING = """
import numpy as np
import gpu_adam
from gpu_adam.communicators import Mpi
from gpu_adam.distributed import DataParallelAdam
from gpu_adam.errors import DistributedError
with Mpi() as communicator:
    odd = communicator.rank == 2
    shape, rate, dtype, names = {}
    variables = [gpu_adam.Variable(np.ones(shape, dtype), name=name) for name in names]
    adam = DataParallelAdam(communicator, rate)
    try:
        adam.apply_gradients([(np.ones(shape, dtype), variable) for variable in variables])
    except DistributedError as error:
        assert adam.iterations == 0 and not adam.weights[1:]
        print(f"{{error}}", flush=True)
    communicator.barrier()
"""


def test_alone(device: Device) -> None:
    with Alone(device) as communicator:
        training.check(communicator)
        training.check_default(communicator)
        training.check_accumulated(communicator)
        training.check_loss_scale(communicator)


# With four ranks, the engine's order and the ranks' order give other bits.
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.thorough), 4])
def test_ranks_have_the_bits_of_one_process(ranks: int, tmp_path: Path) -> None:
    ended = jobs.run(tmp_path, ranks, TRAINING.format(large=ranks == 2))
    assert ended.status == 0, ended
    assert ended.out.split() == ["done"] * ranks


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_over_nccl_whatever_the_driver_does_first(
    gpu: Device, emulation: Any, monkeypatch: pytest.MonkeyPatch, seed: int, deterministic: bool
) -> None:
    from gpu_adam.devices import cuda  # noqa: PLC0415  (imports CuPy)

    monkeypatch.setattr(cuda, "nccl_module", lambda: fake_nccl.Nccl(gpu.xp))
    mine, theirs = training.variables(gpu), training.variables(gpu)
    with emulation.asynchronous(seed=seed), Nccl(fake_nccl.Comm(0, 1), gpu) as communicator:
        adam = DataParallelAdam(communicator, 0.1, deterministic=deterministic, global_clipnorm=0.1)
        found = training.steps_of_ranks(adam, 0, mine, 3)
    expected = training.steps_of_one(gpu_adam.Adam(0.1, global_clipnorm=0.1), 1, theirs, 3)
    training.same(found, expected, "over NCCL")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("((3,), 0.2 if odd else 0.1, 'f4', 'ab')", "learning_rate = 0.1 (got learning_rate = 0.2)"),
        ("((4,) if odd else (3,), 0.1, 'f4', 'ab')", "a: float32 (3,) with a gradient of float32 (got a: float32 (4,)"),
        ("((3,), 0.1, 'f8' if odd else 'f4', 'ab')", "(got a: float64 (3,)"),
        ("((3,), 0.1, 'f4', 'a' if odd else 'ab')", "b: float32 (3,) with a gradient of float32 (got nothing)"),
    ],
    ids=["rate", "shape", "dtype", "variables"],
)
def test_a_rank_that_trains_something_else_is_named(values: str, message: str, tmp_path: Path) -> None:
    ended = jobs.run(tmp_path, 3, DISAGREEING.format(values))
    assert ended.status == 0, ended
    lines = ended.out.splitlines()
    assert len(lines) == 3, "every rank says so"
    assert all(line.startswith("rank 2 must do what rank 0 does, ") and message in line for line in lines), lines


def differing(start: Callable[[DataParallelAdam, list[Variable], bool], object], **options: Any) -> list[str]:
    """What the step of each of three ranks raises, of which the last has done something else before.

    Args:
        start: does it: with the optimizer, its variables, and whether this is the last rank.
        **options: of the optimizer.
    """

    def work(communicator: Communicator) -> str:
        variables = [Variable(np.ones(3, np.float32), name=name, device="host") for name in "ab"]
        adam = DataParallelAdam(communicator, 0.1, **options)
        pairs = [(np.ones(3, np.float32), variable) for variable in variables]
        adam.apply_gradients(pairs)
        before = [variable.numpy().tobytes() for variable in variables]
        start(adam, variables, communicator.rank == 2)
        try:
            adam.apply_gradients(None if adam._accumulator.calls else pairs)
        except DistributedError as error:
            assert [variable.numpy().tobytes() for variable in variables] == before
            assert adam.iterations == 1
            return str(error)
        return ""

    return on_ranks(3, work)


def accumulate(adam: DataParallelAdam, variables: list[Variable], calls: int) -> None:
    for _ in range(calls):
        adam.accumulate([(np.ones(3, np.float32), variable) for variable in variables])


def test_ranks_that_have_accumulated_another_number_of_times() -> None:
    words = (
        "rank 2 must do what rank 0 does, the mean over 2 calls of accumulate (got the mean over 3 calls of "
        "accumulate); run the same program with the same arguments in all ranks."
    )
    assert differing(lambda adam, of, is_last: accumulate(adam, of, 2 + is_last)) == [words] * 3
    assert differing(lambda adam, of, is_last: accumulate(adam, of, 2)) == [""] * 3
    assert differing(lambda adam, of, is_last: accumulate(adam, of, 2 + is_last), accumulation="sum") == [""] * 3


@pytest.mark.parametrize("accumulation", ["mean", "sum"])
def test_ranks_that_have_accumulated_for_other_variables(accumulation: str) -> None:
    found = differing(
        lambda adam, of, is_last: accumulate(adam, of[:1] if is_last else of, 2), accumulation=accumulation
    )
    assert len(set(found)) == 1
    assert "b: float32 (3,) with a gradient of float32 (got nothing)" in found[0]


def test_ranks_with_other_groups() -> None:
    def group(adam: DataParallelAdam, of: list[Variable], is_last: bool) -> None:
        adam.set_group(of[:1], weight_decay=0.2 if is_last else 0.1)

    found = differing(group)
    assert len(set(found)) == 1
    assert re.search(r"a: Settings\(.*weight_decay=0.1.*\(got a: Settings\(.*weight_decay=0.2", found[0])
    found = differing(lambda adam, of, is_last: adam.exclude_from_weight_decay(of[is_last:]), weight_decay=0.1)
    assert len(set(found)) == 1
    assert "a: weights do not decay (got b: weights do not decay)" in found[0]
    found = differing(lambda adam, of, is_last: adam.exclude_from_weight_decay(var_names=["ab"[is_last]]))
    assert len(set(found)) == 1
    assert "do not decay: ('a',) (got weights with these names do not decay: ('b',))" in found[0]


def test_arguments() -> None:
    communicator = Alone("host")
    with pytest.raises(ArgumentTypeError, match="communicator must be a Communicator"):
        DataParallelAdam(0.1)
    with pytest.raises(ArgumentTypeError, match="deterministic must be True or False"):
        DataParallelAdam(communicator, deterministic=2)  # type: ignore[arg-type]
    with pytest.raises(
        ArgumentTypeError, match=r"must have a communicator .*DataParallelAdam\(communicator, \*\*config"
    ):
        DataParallelAdam.from_config(gpu_adam.Adam().get_config())
    again = DataParallelAdam(communicator, **DataParallelAdam(communicator, 0.2, clipnorm=1.0).get_config())
    assert (again.lr, again.clipnorm) == (0.2, 1.0)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (np.ones(4, np.float32), "must have shape"),
        (np.ones((4, 2), np.float64), "must have dtype"),
        (IndexedSlices(np.ones((2, 2), np.float32), [[0, 1]]), "one-dimensional array of integers"),
        (IndexedSlices(np.ones((2, 2), np.float32), [0, 1, 2]), "must have shape"),
        (IndexedSlices(np.ones((1, 2), np.float32), [4]), "IndexedSlices.indices"),
    ],
)
def test_bad_gradients_change_nothing(gradient: Any, message: str) -> None:
    adam, variable = DataParallelAdam(Alone("host"), 0.1), Variable(np.ones((4, 2), np.float32))
    with pytest.raises((ValueError, IndexError), match=message):
        adam.apply_gradients([(gradient, variable)])
    assert adam.iterations == 0
    assert variable.numpy().tolist() == [[1, 1]] * 4


def test_a_variable_elsewhere_is_refused(gpu: Device) -> None:
    variable = Variable(np.ones(3), device=gpu)
    with pytest.raises(ArgumentValueError, match="must lie on the communicator's device, host"):
        DataParallelAdam(Alone("host"), 0.1).apply_gradients([(gpu.zeros((3,), variable.dtype), variable)])


def test_any_set_of_variables(device: Device) -> None:
    """From step to step; buckets are made for each."""
    variables = [Variable(np.ones(3, np.float32) * number, device=device) for number in range(3)]
    others = [Variable(variable.numpy(), device=device) for variable in variables]
    adam, alone = DataParallelAdam(Alone(device), 0.1), gpu_adam.Adam(0.1)
    for step, chosen in enumerate([(0, 1, 2), (1,), (2, 0), (0, 1, 2), (0,)]):
        for each, of in ((adam, variables), (alone, others)):
            each.apply_gradients([(device.array(np.full(3, n - step, np.float32)), of[n]) for n in chosen])
    training.same([each.numpy() for each in variables], [each.numpy() for each in others], "sets")


def test_a_missing_gradient_is_warned_of() -> None:
    first, second = Variable(np.ones(3), name="first"), Variable(np.ones(3), name="second")
    with pytest.warns(UserWarning, match="second"):
        DataParallelAdam(Alone("host"), 0.5).apply_gradients([(np.ones(3), first), (None, second)])
    assert (first.numpy()[0].round(2), second.numpy()[0]) == (0.5, 1)


def test_a_loss(device: Device) -> None:
    weights = Variable(np.zeros(3), device=device)
    adam = DataParallelAdam(Alone(device), 0.1)
    for _ in range(3):
        adam.minimize(lambda: sum((weights - 1) ** 2), [weights])
    assert weights.numpy().round(2).tolist() == [0.3, 0.3, 0.3]
