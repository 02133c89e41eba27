"""Trainings on several ranks beside the same training in one process, which accumulates the gradients of all ranks.

A case is a function of `Both`, by which it makes calls of either optimizer. Every rank writes down a digest of what it
has after each step; rank 0, which has the other process's optimizer beside its own, also what it should have been.
"""

import gc
import hashlib
import json
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from communicators import operations

import gpu_adam
from gpu_adam import schedules
from gpu_adam.communicators import Communicator
from gpu_adam.distributed import ShardedAdam
from gpu_adam.kernels import CHUNK, dtype_named

from . import arguments

Array = np.ndarray[Any, np.dtype[Any]]

SHAPES = [(100, 70), (5,), (CHUNK // 2, 3), (), (0, 3), (17,), (CHUNK + 100,)]
BUCKET_BYTES = 40_000
"""So that variables are cut, share buckets, and have some to themselves."""


def numbers(seed: Sequence[int], shape: tuple[int, ...], dtype: str) -> Array:
    """Random numbers that every process knows."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    return np.asarray(values + 1j * rng.standard_normal(shape) if "complex" in dtype else values, dtype_named(dtype))


MANY, FEW = 100, 10
"""Steps of the long cases, with three ranks and with others."""


class Both:
    """An optimizer of several ranks and, where there is a `reference`, one that is alone, over equal variables.

    Args:
        communicator: of the ranks.
        dtypes: of the variables, or one for all.
        deterministic: whether bits are to be equal.
        constraint: of all variables.
        shapes: of the variables; more than these begin with the first again.
        tables: numbers of those that get `IndexedSlices`.
        **options: of both optimizers.

    Attributes:
        sharded, variables: the optimizer of several ranks, and its variables.
        reference, others: the other one's; None and none but on rank 0.
        steps: how many there were.
        is_positive: whether all gradients are to be positive.
        digests: what became of the variables, after each step and at the end.
        expected: what should have.
    """

    def __init__(
        self,
        communicator: Communicator,
        dtypes: str | Sequence[str] = "float32",
        *,
        deterministic: bool = True,
        constraint: Any = None,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        tables: Sequence[int] = (),
        **options: Any,
    ) -> None:
        self.communicator, self.steps, self.is_positive = communicator, 0, False
        self._shapes, self.tables = shapes, tables
        self._dtypes = [dtypes] * len(shapes) if isinstance(dtypes, str) else list(dtypes)
        self._constraint = constraint
        self.variables: list[gpu_adam.Variable] = []
        self.others: list[gpu_adam.Variable] = []

        def made(maker: Callable[..., gpu_adam.Adam], *args: Any, **own: Any) -> gpu_adam.Adam:
            return maker(*args, **{"learning_rate": 0.01, **options}, **own)

        self.sharded = made(ShardedAdam, communicator, deterministic=deterministic, bucket_bytes=BUCKET_BYTES)
        self.reference = made(gpu_adam.Adam) if communicator.rank == 0 else None
        self.add(len(shapes))
        self.digests: list[str] = []
        self.expected: list[str] = []

    def add(self, count: int) -> None:
        """Have some more variables, which are built by the next step or by a call."""
        for number in range(len(self.variables), len(self.variables) + count):
            shape, dtype = self._shapes[number % len(self._shapes)], self._dtypes[number % len(self._shapes)]
            start, name = numbers([number], shape, dtype), f"{'bias' if number % 3 == 1 else 'w'}{number}"
            lists = [self.variables, self.others] if self.reference is not None else [self.variables]
            for each in lists:
                each.append(
                    gpu_adam.Variable(start, name=name, device=self.communicator.device, constraint=self._constraint)
                )

    def each(self, call: Callable[[Any, list[gpu_adam.Variable]], object]) -> None:
        """Make a call of both optimizers, whose second argument are the variables."""
        call(self.sharded, self.variables)
        if self.reference is not None:
            call(self.reference, self.others)

    def gradients(self, rank: int, dtype: str | None = None, infinity_in: int | None = None) -> list[Array]:
        """A rank's gradients at this step."""
        given = [
            numbers([self.steps, number, rank], variable.shape, dtype or variable.dtype.name)
            for number, variable in enumerate(self.variables)
        ]
        if self.is_positive:
            given = [abs(each) + each.dtype.type(0.5) for each in given]
        if rank == infinity_in:
            given[2].reshape(-1)[-3] = np.inf
        return given

    def step(
        self,
        *,
        dtype: str | None = None,
        infinity_in: int | None = None,
        way: str = "pairs",
        scale: float | None = None,
    ) -> None:
        """One step with gradients that are new.

        Args:
            dtype: of the gradients; None for that of the variables.
            infinity_in: the rank, one gradient of which has an infinity.
            way: "pairs"; "push" in an order of the rank's own; "half", some of them by push.
            scale: by which the gradients are multiplied, a power of two.
        """
        rank, ranks, device = self.communicator.rank, self.communicator.size, self.communicator.device

        def scaled(gradients: list[Array]) -> list[Any]:
            return [device.array(g if scale is None else g * g.dtype.type(scale)) for g in gradients]

        def given(rank: int) -> list[Array]:
            return self.gradients(rank, dtype, infinity_in)

        pairs = list(zip(scaled(given(rank)), self.variables, strict=True))
        order = np.random.default_rng([self.steps, rank]).permutation(len(pairs))
        pushed = order[: {"pairs": 0, "half": len(pairs) // 2, "push": len(pairs)}[way]].tolist()
        if not self.digests:
            self.sharded.build(self.variables)
        for number in pushed:
            assert isinstance(self.sharded, ShardedAdam)
            self.sharded.push_gradient(pairs[number][1], pairs[number][0])
        rest = [pair for number, pair in enumerate(pairs) if number not in pushed]
        returned = self.sharded.apply_gradients(rest or None, grad_scale=scale)
        if self.reference is not None:
            for other in range(ranks):
                # Of a scale that is a power of two the quotient has the gradients' bits: no rounding can differ.
                self.reference.accumulate(list(zip(map(device.array, given(other)), self.others, strict=True)))
            assert self.reference.apply_gradients() == returned
        self.note()

    def step_tables(self, *, infinity_in: int | None = None, noted: bool = True) -> None:
        """One step, in which the tables get slices. One process gets the slices of all ranks, and the arrays added up.

        Args:
            infinity_in: as of `step`.
            noted: whether to read what there is.
        """
        ranks, device = self.communicator.size, self.communicator.device
        given = [[*self.gradients(rank, None, infinity_in)] for rank in range(ranks)]
        found: list[list[tuple[Array, Array]]] = []
        for rank in range(ranks):
            rng = np.random.default_rng([self.steps, rank])
            counts = [int(rng.integers(0, 9)) if (self.steps + rank) % 4 else 0 for _ in self.tables]
            drawn = [
                rng.integers(0, len(self.variables[n]), count) for n, count in zip(self.tables, counts, strict=True)
            ]
            found.append(
                [
                    (numbers([self.steps, n, rank], (len(rows), *self.variables[n].shape[1:]), "float32"), rows)
                    for n, rows in zip(self.tables, drawn, strict=True)
                ]
            )

        def slices(values: Array, rows: Array, number: int) -> gpu_adam.IndexedSlices:
            dtype = self.variables[number].dtype
            return gpu_adam.IndexedSlices(device.array(values.astype(dtype)), device.array(rows))

        mine: list[Any] = list(map(device.array, given[self.communicator.rank]))
        for n, (values, rows) in zip(self.tables, found[self.communicator.rank], strict=True):
            mine[n] = slices(values, rows, n)
        if not self.steps:
            assert isinstance(self.sharded, ShardedAdam)
            self.sharded.build(self.variables, tables=[self.variables[n] for n in self.tables])
        returned = self.sharded.apply_gradients(zip(mine, self.variables, strict=True))
        if self.reference is not None:
            joined: list[Any] = [device.array(operations.summed(list(each))) for each in zip(*given, strict=True)]
            for place, n in enumerate(self.tables):
                parts = [each[place] for each in found]
                values, rows = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
                joined[n] = slices(values, rows, n)
            scale = float(ranks) if ranks > 1 else None
            assert self.reference.apply_gradients(zip(joined, self.others, strict=True), grad_scale=scale) == returned
        if noted:
            self.note()
        else:
            self.steps += 1

    def minimize(self) -> None:
        """One step by a loss of the rank's own."""
        device = self.communicator.device

        def loss(variables: list[gpu_adam.Variable], rank: int) -> Callable[[], Any]:
            data = list(map(device.array, self.gradients(rank)))
            return lambda: sum(((w - x) ** 2).sum() for w, x in zip(variables, data, strict=True))

        self.sharded.minimize(loss(self.variables, self.communicator.rank), self.variables)
        if self.reference is not None:
            for rank in range(self.communicator.size):
                gradients = self.reference.get_gradients(loss(self.others, rank), self.others)
                if self.reference.loss_scale is not None:
                    gradients = [gradient * self.reference.loss_scale.array for gradient in gradients]
                self.reference.accumulate(list(zip(gradients, self.others, strict=True)))
            self.reference.apply_gradients()
        self.note()

    def note(self) -> None:
        """Write down what there is, and what should be."""
        self.steps += 1
        self.digests.append(_digest(self.sharded, self.variables))
        if self.reference is not None:
            self.expected.append(_digest(self.reference, self.others))

    def slots(self) -> list[str]:
        """Digests of what this rank owns of each slot."""
        return [
            _hash(self.sharded.get_slot(self.variables[self._place(piece)], name).numpy())
            for name in self.sharded.get_slot_names()
            for piece in self._owned(self.communicator.rank)
        ]

    def expected_slots(self) -> list[list[str]]:
        """What they should be on each rank."""
        reference = self.reference
        if reference is None:
            return []
        return [
            [
                _hash(reference.get_slot(self.others[self._place(p)], name).numpy().reshape(-1)[p.begin :][: p.size])
                for name in self.sharded.get_slot_names()
                for p in self._owned(rank)
            ]
            for rank in range(self.communicator.size)
        ]

    def _owned(self, rank: int) -> list[Any]:
        assert isinstance(self.sharded, ShardedAdam)
        shards = self.sharded._shards.shards
        return [piece for shard in shards for piece in shard.bucket.pieces[rank] if piece.size]

    def _place(self, piece: Any) -> int:
        """Of which of the variables a piece is."""
        assert isinstance(self.sharded, ShardedAdam)
        return list(map(id, self.variables)).index(id(self.sharded._whole[piece.variable]))


def _digest(optimizer: gpu_adam.Adam, variables: list[gpu_adam.Variable]) -> str:
    scale = None if optimizer.loss_scale is None else optimizer.loss_scale.value
    numbers = int(optimizer.iterations.numpy()), scale, optimizer.skipped_steps
    return f"{numbers} {_hash(*(variable.numpy() for variable in variables))}"


def _hash(*arrays: Array) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:12]


# The cases.


def _train(steps: int | None = None, **at_each: Any) -> Callable[[Both], None]:
    """Steps, some of which are left out; None for many."""

    def case(both: Both) -> None:
        last = both.communicator.size - 1
        for step in range(MANY if both.communicator.size == 3 else FEW) if steps is None else range(steps):
            both.step(infinity_in=last if step % 10 == 7 else None, **at_each)

    return case


def _plainly(steps: int, **at_each: Any) -> Callable[[Both], None]:
    def case(both: Both) -> None:
        for _ in range(steps):
            both.step(**at_each)

    return case


def _groups(both: Both) -> None:
    both.each(lambda optimizer, variables: optimizer.set_group(variables[1], weight_decay=0.0, beta_1=0.5))
    both.each(lambda optimizer, variables: optimizer.set_group(variables[:3], learning_rate_multiplier=0.5))
    for step in range(6):
        both.step()
        if step == 2:
            both.each(lambda optimizer, variables: optimizer.set_group(variables[6], epsilon=1e-3))


def _excluded(both: Both) -> None:
    both.each(lambda optimizer, variables: optimizer.exclude_from_weight_decay(variables[5], ["^bias"]))
    _plainly(5)(both)
    both.each(lambda optimizer, variables: optimizer.exclude_from_weight_decay(var_names=["2$"]))
    _plainly(3)(both)


def _averages(both: Both) -> None:
    _plainly(5)(both)
    both.each(lambda optimizer, variables: optimizer.overwrite_by_averages(variables[1]))  # which one rank owns
    both.note()
    _plainly(2)(both)
    both.each(lambda optimizer, variables: optimizer.overwrite_by_averages())
    both.note()
    _plainly(2)(both)


def _set(name: str, value: Any, optimizer: Any, variables: list[gpu_adam.Variable]) -> None:
    setattr(optimizer, name, value)


def _assigned(both: Both) -> None:
    """Hyperparameters that change while it trains."""
    for name, value in (("learning_rate", 0.1), ("beta_1", 0.7), ("clipnorm", None), ("clipvalue", 0.3)):
        _plainly(2)(both)
        both.each(partial(_set, name, value))
    both.each(lambda optimizer, _: setattr(optimizer, "amsgrad", True))
    _plainly(2)(both)
    both.each(lambda optimizer, _: setattr(optimizer, "iterations", 1))
    _plainly(2)(both)


def _called(both: Both) -> None:
    both.each(lambda optimizer, _: setattr(optimizer, "learning_rate", lambda: 0.1 / (1 + both.steps)))
    _plainly(5)(both)


def _later(both: Both) -> None:
    """More variables, by build and without a call of their own."""
    _plainly(2)(both)
    for _ in range(2):
        both.add(3)
        both.each(lambda optimizer, variables: optimizer.build(variables))
        _plainly(3)(both)
    both.add(1)
    both.each(lambda optimizer, variables: optimizer.set_group(variables[-1], learning_rate_multiplier=2.0))
    _plainly(2, way="push")(both)


def _minimized(both: Both) -> None:
    for _ in range(4):
        both.minimize()


def _scaled(both: Both) -> None:
    _plainly(3, scale=1024.0)(both)
    _plainly(2)(both)


def _mistaken(both: Both) -> None:
    """One rank makes calls that are refused before each good one; the others know nothing of it."""
    for _ in range(4):
        if both.communicator.rank == both.communicator.size // 2 and both.steps:
            assert isinstance(both.sharded, ShardedAdam)
            arguments.refused(both.sharded, both.variables)
        both.step()


def _tables(both: Both) -> None:
    for step in range(10):
        last = both.communicator.size - 1
        both.step_tables(infinity_in=last if step == 5 else None, noted=step % 3 == 0)


def _tiny(both: Both) -> None:
    """Most ranks own nothing."""
    both.each(lambda optimizer, variables: optimizer.set_group(variables, learning_rate_multiplier=2.0))
    _plainly(3)(both)
    both.each(lambda optimizer, variables: optimizer.exclude_from_weight_decay(variables[0]))
    both.each(lambda optimizer, variables: optimizer.overwrite_by_averages(variables[0]))
    _plainly(3, way="push")(both)


def _ways(both: Both) -> None:
    for way in ("push", "half", "pairs", "push"):
        _plainly(4, way=way)(both)


def half(array: Any) -> Any:
    """A constraint."""
    return array * array.dtype.type(0.5)


TABLES = {"shapes": [(100, 70), (50, 3), (5,), (3000, 4), (7,), (2, 5)], "tables": [1, 3, 4, 5]}
MASTERS = {"dtypes": "bfloat16", "master_weights": True}
MIXED = ["float32", "bfloat16", "float64", "float32", "float16", "bfloat16", "float32"]

CASES: dict[str, tuple[dict[str, Any], Callable[[Both], None]]] = {
    "clipped one by one": ({"clipnorm": 0.5, "clipvalue": 2.0, "amsgrad": True, "skip_nonfinite": True}, _train()),
    "clipped together": ({"global_clipnorm": 0.3, "skip_nonfinite": True, "weight_decay": 0.01, "l2": 0.1}, _train()),
    "masters": (
        {"dtypes": "bfloat16", "master_weights": True, "global_clipnorm": 3.0, "skip_nonfinite": True},
        _train(),
    ),
    "float16": ({"dtypes": "float16", "clipnorm": 0.5, "loss_scale": gpu_adam.LossScale(64.0, 5)}, _train(20)),
    "loss scale": ({"loss_scale": gpu_adam.LossScale(4.0, 3), "global_clipnorm": 1.0}, _train(20)),
    "float32 for bfloat16": (
        {"dtypes": "bfloat16", "master_weights": True, "clipvalue": 1.0},
        _plainly(6, dtype="float32"),
    ),
    "bfloat16 for float32": ({"clipnorm": 1.0}, _plainly(4, dtype="bfloat16")),
    "slots of 16 bits": ({"slot_dtype": "bfloat16", "global_clipnorm": 1.0}, _plainly(5)),
    "complex, absolute": ({"dtypes": "complex64", "global_clipnorm": 0.5}, _plainly(6)),
    "complex, parts": ({"dtypes": "complex64", "complex_mode": "real_imag", "clipnorm": 0.5}, _plainly(6)),
    "float64, clipped one by one": ({"dtypes": "float64", "clipnorm": 0.5}, _plainly(8)),
    "float64, clipped together": ({"dtypes": "float64", "global_clipnorm": 0.5}, _plainly(8)),
    "complex128": ({"dtypes": "complex128", "clipvalue": 0.5, "amsgrad": True}, _plainly(3)),
    "mixed": ({"dtypes": MIXED}, _plainly(5)),
    "mixed, clipped one by one": ({"dtypes": MIXED, "clipnorm": 0.5}, _plainly(5)),
    "mixed, clipped together": ({"dtypes": MIXED, "global_clipnorm": 0.5}, _plainly(5)),
    "mixed, skipped": ({"dtypes": MIXED, "global_clipnorm": 0.5, "skip_nonfinite": True}, _train(9)),
    "groups": ({"weight_decay": 0.1, "global_clipnorm": 2.0}, _groups),
    "excluded": ({"weight_decay": 0.1}, _excluded),
    "averages": ({"use_ema": True, "ema_momentum": 0.7}, _averages),
    "averages of masters": ({**MASTERS, "use_ema": True}, _averages),
    "callable": ({"epsilon_form": "paper", "maximize": True}, _called),
    "schedule": ({"learning_rate": schedules.ExponentialDecay(0.1, 2, 0.5), "decay": 0.1}, _plainly(5)),
    "schedule, skipped": (
        {"learning_rate": schedules.ExponentialDecay(0.1, 2, 0.5), "skip_nonfinite": True, "clipnorm": 0.5},
        _train(12),
    ),
    "assigned": ({"clipnorm": 1.0}, _assigned),
    "later": ({"global_clipnorm": 1.0}, _later),
    "minimized": ({"clipnorm": 100.0}, _minimized),
    "minimized, scaled": ({"loss_scale": gpu_adam.LossScale(8.0, 2)}, _minimized),
    "added": ({"accumulation": "sum", "clipnorm": 1.0}, _plainly(4)),
    "scaled": ({"global_clipnorm": 5.0}, _scaled),
    "tables": ({**TABLES}, _tables),
    "tables, clipped": ({**TABLES, "clipvalue": 1.0, "amsgrad": True}, _tables),
    "tables, clipped one by one": ({**TABLES, "clipnorm": 0.5}, _tables),
    "tables, clipped together": ({**TABLES, "global_clipnorm": 0.5, "weight_decay": 0.1}, _tables),
    "tables, skipped": ({**TABLES, "global_clipnorm": 0.5, "skip_nonfinite": True, "use_ema": True}, _tables),
    "tables, masters": ({**TABLES, **MASTERS, "skip_nonfinite": True}, _tables),
    "tables, deferred": ({**TABLES, "sparse_update": "deferred"}, _tables),
    "tables, deferred, clipped": ({**TABLES, "sparse_update": "deferred", "clipnorm": 0.5}, _tables),
    "tables, deferred, skipped": (
        {**TABLES, "sparse_update": "deferred", "global_clipnorm": 0.5, "skip_nonfinite": True},
        _tables,
    ),
    "tiny": ({"shapes": [(3,), (0, 2)], "use_ema": True, "global_clipnorm": 1.0, "skip_nonfinite": True}, _tiny),
    "mistaken": ({"clipnorm": 1.0}, _mistaken),
    "any order": ({"global_clipnorm": 1.0}, _ways),
    "constraint": ({"constraint": half, "skip_nonfinite": True}, _train(9)),
}


SOME = (
    *("clipped one by one", "masters", "float16", "complex, absolute", "mixed, clipped together", "groups"),
    *("averages of masters", "schedule, skipped", "later", "minimized, scaled", "tables, clipped together"),
    *("tables, deferred, skipped", "tiny", "any order", "constraint"),
)
"""Cases that have, together, a bit of everything."""


def compare(communicator: Communicator, names: Sequence[str] = tuple(CASES)) -> dict[str, Any]:
    """Go through cases; what each has become, and on rank 0 should have."""
    found: dict[str, Any] = {}
    for name in names:
        options, case = CASES[name]
        both = Both(communicator, **options)
        case(both)
        found[name] = [both.digests, both.slots(), both.expected, both.expected_slots()]
    return found


def nearly(communicator: Communicator, steps: int = 10) -> dict[str, tuple[float, str]]:
    """In the engine's own order: how far off rank 0's variables are, as a part of what may be, and their digest.

    All gradients are positive, so that nothing cancels: a sum of W numbers is off by W roundings of it at most, and
    m, the root of v and their quotient by as many; each step also rounds the variable.
    """
    found = {}
    for dtype in ("float32", "float64", "complex64"):
        both = Both(communicator, dtype, deterministic=False, learning_rate=0.01)
        both.is_positive = True
        _plainly(steps)(both)
        ranks, epsilon = communicator.size, np.finfo(dtype_named(dtype)).eps
        worst = 0.0
        for variable, other in zip(both.variables, both.others, strict=False):
            one, two = variable.numpy(), other.numpy()
            allowed = steps * epsilon * (0.01 * 4 * ranks + np.abs(two))
            worst = max(worst, float(np.max(np.abs(one - two) / allowed, initial=0.0)))
        found[dtype] = worst, both.digests[-1]
    return found


def memory(communicator: Communicator) -> dict[str, list[float]]:
    """Bytes of arrays that an optimizer and its variables keep, and at most have, each beside what is said.

    All arrays of the host device are counted. Every bucket travels before the first of them arrives.
    """
    found = {}
    device = communicator.device
    alive, most = 0, 0
    empty = device.empty

    def counted(size: int, dtype: np.dtype) -> Any:
        nonlocal alive, most
        array = empty(size, dtype)
        alive += array.nbytes
        most = max(most, alive)
        weakref.finalize(array.base, freed, array.nbytes)
        return array

    def freed(nbytes: int) -> None:
        nonlocal alive
        alive -= nbytes

    for dtype, ordered in (("float32", False), ("float32", True), ("bfloat16", False)):
        starts = [numbers([number], shape, dtype) for number, shape in enumerate([(300, 1000), (200_000,), (999, 301)])]
        gradients = [np.zeros_like(start) for start in starts]
        parameters, elements = sum(start.nbytes for start in starts), sum(start.size for start in starts)
        gc.collect()
        before = alive
        device.empty = counted  # type: ignore[method-assign]
        variables = [gpu_adam.Variable(start, device=device) for start in starts]
        optimizer = ShardedAdam(communicator, deterministic=ordered, bucket_bytes=2**20)
        optimizer.build(variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        most = alive
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        del device.empty
        ranks = communicator.size
        said = parameters + 2 * 4 * elements / ranks
        if ranks > 1:
            said += parameters + 4 * elements / ranks
        most_said = said + (parameters if ranks > 1 and (ordered or dtype == "bfloat16") else 0)
        found[f"{dtype}, ordered={ordered}"] = [alive - before, said, most - before, most_said]
    return found


def main(communicator: Communicator, names: Sequence[str]) -> None:
    """Write down, in this folder, what this rank has found in some cases."""
    found = {"cases": compare(communicator, names), "nearly": nearly(communicator), "memory": memory(communicator)}
    Path(f"{communicator.rank}.json").write_text(json.dumps(found))
