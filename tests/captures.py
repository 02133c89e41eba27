"""Optimizers with work to do, which tests capture: the same on every device."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from reference import Array, assert_same_bits

import gpu_adam
from gpu_adam import IndexedSlices, Variable, devices
from gpu_adam.devices import Device

HOST = devices.HostDevice(threads=1)


def context_of(device: Device, seed: int | None = None) -> contextlib.AbstractContextManager[Any]:
    """A stream that may be captured; on the emulated GPU work runs as late as can be, or by lot, with a seed."""
    stack = contextlib.ExitStack()
    if device.name != "host":
        if getattr(device.xp, "__emulated__", False):
            asynchronous = importlib.import_module("cupy._emulation").asynchronous
            stack.enter_context(asynchronous() if seed is None else asynchronous(seed=seed))
        stack.enter_context(device.activate())
        device.xp.cuda.Device().synchronize()
        stack.enter_context(device.xp.cuda.Stream(non_blocking=True))
    return stack


class Work:
    """Variables whose gradients are computed from a batch that lies still; the same numbers on every device.

    Args:
        device: where.
        kind: "dense", "sparse" or "both".
        dtypes: of the dense variables, by turns.
        constraint: of each variable.
    """

    def __init__(self, device: Device, kind: str, dtypes: Sequence[str] = ("float32",), constraint: Any = None) -> None:
        self.device = device
        rng = np.random.default_rng(5)
        shapes = [(3,), (17, 5), (4097,), ()] if kind != "sparse" else []
        self.variables = [
            Variable(rng.standard_normal(shape).astype(dtypes[k % len(dtypes)]), device=device, constraint=constraint)
            for k, shape in enumerate(shapes)
        ]
        self.batch = [device.array(variable.numpy()) for variable in self.variables]
        self.table = None
        if kind != "dense":
            self.table = Variable(rng.standard_normal((9, 5)).astype(np.float32), device=device, name="table")
            self.rows = device.array(np.array([1, 7, 1, 0, 8, 7]))
            self.values = device.array(rng.standard_normal((6, 5)).astype(np.float32))

    def next_batch(self, seed: int, *, is_bad: bool = False) -> None:
        """Other numbers in the same memory; a bad batch has one from which a gradient that is not finite comes."""
        rng = np.random.default_rng(seed)
        with self.device.activate():
            for array in self.batch:
                array[...] = self.device.array(rng.standard_normal(array.shape).astype(array.dtype))
            if self.table is not None:
                self.rows[...] = self.device.array(rng.integers(0, 9, 6))
                self.values[...] = self.device.array(rng.standard_normal((6, 5)).astype(np.float32))
            if is_bad:
                spoilt = self.batch[seed % len(self.batch)] if self.batch else self.values
                spoilt.reshape(-1)[-1:] = np.inf

    def pairs(self, factor: Any = None) -> list[tuple[Any, Variable]]:
        """Gradients, new arrays of operations that have the same bits everywhere; times a factor, if there is one."""
        found: list[tuple[Any, Variable]] = [
            ((variable.value - array) * array.dtype.type(1.5), variable)
            for variable, array in zip(self.variables, self.batch, strict=True)
        ]
        if factor is not None:
            found = [(gradient * factor.astype(gradient.dtype), variable) for gradient, variable in found]
        if self.table is not None:
            values = self.values * np.float32(0.5)
            found.append((IndexedSlices(values if factor is None else values * factor, self.rows), self.table))
        return found

    @property
    def all(self) -> list[Variable]:
        """All variables."""
        return [*self.variables, *([] if self.table is None else [self.table])]


def state(optimizer: gpu_adam.Adam, work: Work) -> dict[str, Array]:
    """All variables and weights, waited for."""
    numbers = {f"variable {number}": variable.numpy() for number, variable in enumerate(work.all)}
    return {**numbers, **optimizer.export()}


def assert_same_state(actual: dict[str, Array], expected: dict[str, Array]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(actual[name], array, name)


class Case:
    """An optimizer with its work on a device.

    Args:
        device: where.
        config: of the optimizer; a learning rate "callable" looks at the count, "schedule" is one.
        kind, dtypes, constraint: as for Work.
        groups: whether variables have numbers of their own.
    """

    def __init__(
        self,
        device: Device,
        *,
        config: dict[str, Any],
        kind: str = "dense",
        dtypes: Sequence[str] = ("float32",),
        constraint: Any = None,
        groups: bool = False,
    ) -> None:
        self.work = Work(device, kind, dtypes, constraint)
        rates: dict[str, Any] = {
            "callable": lambda: 0.1 / (1 + int(self.optimizer.iterations)),
            "schedule": gpu_adam.ExponentialDecay(0.1, decay_steps=10, decay_rate=0.9),
        }
        rate = config.get("learning_rate", 0.05)
        self.optimizer: gpu_adam.Adam = gpu_adam.Adam(**{**config, "learning_rate": rates.get(rate, rate)})
        if device is HOST and self.optimizer.flavour.loss_scale is not None:
            self.optimizer.build(self.work.all)  # else a loss scale that is read first lies on the default device
        if groups:
            self.optimizer.exclude_from_weight_decay(self.work.variables[1])
            self.optimizer.set_group(self.work.variables[2], learning_rate_multiplier=3.0, beta_1=0.5)

    def step(self) -> int | None:
        """One step of all variables, of a loss that is multiplied by the loss scale, if there is one."""
        scale = self.optimizer.loss_scale
        return self.optimizer.apply_gradients(self.work.pairs(None if scale is None else scale.array))

    def given(self, **options: Any) -> int | None:
        """One step whose gradients are the batch itself: nothing is allocated.

        Args:
            options: of apply_gradients.
        """
        pairs: list[tuple[Any, Variable]] = list(zip(self.work.batch, self.work.variables, strict=True))
        if self.work.table is not None:
            pairs.append((IndexedSlices(self.work.values, self.work.rows), self.work.table))
        return self.optimizer.apply_gradients(pairs, **options)

    def stage_and_launch(self, graph: Any) -> int | None:
        """One step by a graph that was captured by other means than `Adam.capture`."""
        done = self.optimizer.stage()
        graph.launch()
        return done


@contextlib.contextmanager
def captured(device: Device, graphs: list[Any], mode: int = 0) -> Iterator[None]:
    """Capture the current stream, in the mode "global", which torch.cuda.graph has too."""
    stream = device.xp.cuda.get_current_stream()
    stream.begin_capture(mode)
    try:
        yield
    finally:
        graphs.append(stream.end_capture())
