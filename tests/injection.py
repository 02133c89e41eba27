"""Interruptions at every line: what a call of the optimizer leaves behind must be the state before it or after it.

A *scenario* builds a small world anew for each trial: an optimizer, its variables, one call, and two more steps. A
*trial* makes the call and raises before the k-th line that it executes in gpu_adam (or in contextlib, whose code runs
`with` blocks). What is left is then compared, to the bit, with a world that nobody disturbed. Three kinds of raising:

    keyboard   KeyboardInterrupt, as Python itself raises it between two lines
    memory     MemoryError
    signal     a real SIGINT, delivered to the process before the line

A call may hold signals off for a short stretch. No KeyboardInterrupt reaches a program there, so "keyboard" and
"memory" leave those lines out; "signal" delivers there too. `python tests/injection.py` prints the table of all lines.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from snapshots import contents

import gpu_adam
from gpu_adam import IndexedSlices, Variable
from gpu_adam.devices import Device, HostDevice
from gpu_adam.devices.pair_reader import ExpectedPairs, PairReader
from gpu_adam.errors import SlotNotFoundError
from gpu_adam.interop.keras import export_state, import_state

KINDS = ("keyboard", "memory", "signal")
_CODE = (str(Path(gpu_adam.__file__).parent), contextlib.__file__)
_INTERRUPT = signal.default_int_handler


class World:
    """An optimizer in some state, the call to be disturbed, and what comes after it.

    Args:
        optimizer: the optimizer.
        targets: variables, as they are given to the optimizer.
        call: the call to be disturbed; its argument is the world.
        go_on: two more steps; its argument is the world.
        newcomers: how many of the targets, counted from the end, the optimizer meets in the call for the first time.

    Attributes:
        successor: takes the place of the first target if the call has given that target's slots to it.
    """

    def __init__(
        self,
        optimizer: gpu_adam.Adam,
        targets: list[Any],
        call: Callable[[World], object],
        go_on: Callable[[World], object],
        newcomers: int = 0,
    ) -> None:
        self.optimizer, self.targets, self._call, self._go_on = optimizer, targets, call, go_on
        self.newcomers = newcomers
        self.successor: Any = None
        self._refused: list[Any] = []

    def call(self) -> None:
        """Make the call."""
        self._call(self)

    def go_on(self) -> None:
        """Take two more steps."""
        self._go_on(self)

    def state(self) -> tuple[Any, ...]:
        """Everything that a caller can see, to the bit."""
        if self.successor is not None:
            try:
                self.optimizer.get_slot(self.successor, "m")
                self.targets[0] = self.successor
            except SlotNotFoundError:
                self._refused = [weakref.ref(self.successor)]
            self.successor = None
        weights = [(weight.name, contents(weight)) for weight in self.optimizer.weights]
        settings = [self.optimizer.get_group(target) for target in self.targets]
        names, calls = list(self.optimizer.get_slot_names()), self.optimizer._accumulator.calls
        return weights, names, [contents(target) for target in self.targets], settings, calls

    def identities(self) -> tuple[int, list[int]]:
        """The list of weights and its members as objects."""
        return id(self.optimizer.weights), list(map(id, self.optimizer.weights))

    def kept_alive(self) -> int:
        """How many newcomers the optimizer alone keeps alive; a world with newcomers has no variables after this."""
        first = len(self.targets) - self.newcomers
        watched = [*map(weakref.ref, self.targets[first:]), *self._refused]
        if self.newcomers:
            self.targets.clear()
        if any(ref() is not None for ref in watched):
            gc.collect()
        return sum(ref() is not None for ref in watched)


class Expected(NamedTuple):
    """What undisturbed worlds become.

    Attributes:
        before, after: the state before and after the call.
        on_from_before: the state after two more steps that do without the call.
        on_from_after: the state after the call and two more steps.
    """

    before: Any
    after: Any
    on_from_before: Any
    on_from_after: Any


Factory = Callable[[], World]


def expected(factory: Factory) -> Expected:
    """The states of undisturbed worlds."""
    one, other = factory(), factory()
    before = one.state()
    one.call()
    after = one.state()
    one.go_on()
    other.go_on()
    assert after != before, "the call must change something, or nothing can be torn"
    return Expected(before, after, other.state(), one.state())


def verdict(
    world: World, expect: Expected, identities: tuple[int, list[int]], *, retry: bool, only_before: bool = False
) -> str:
    """Why a world is torn after a call that raised; "" where it is whole. Uses the world up.

    Args:
        world: after the call.
        expect: of undisturbed worlds.
        identities: of the world before the call.
        retry: whether a world that is as before makes the call again, or goes on without it.
        only_before: whether the call must have changed nothing.
    """
    state, (listed, members) = world.state(), world.identities()
    if listed != identities[0] or world.optimizer.weights is not world.optimizer.variables():
        why = "the list of weights is another one"
    elif state == expect.after and not only_before:
        same = members[: len(identities[1])] == identities[1] or _reorders(expect)
        why = (
            _difference(world, expect.on_from_after, "as after") if same else "as after, but weights are other objects"
        )
    elif state != expect.before:
        why = "neither as before nor as after"
    elif members != identities[1]:
        why = "as before, but weights are other objects"
    elif retry:
        why = _second_try(world, expect)
    elif kept := world.kept_alive():
        why = f"as before, but {kept} variables are kept alive"
    else:
        why = "" if world.newcomers else _difference(world, expect.on_from_before, "as before")
    return why


def _second_try(world: World, expect: Expected) -> str:
    try:
        world.call()
    except Exception as error:
        return f"a second try raises {type(error).__name__}: {error}"
    if world.state() != expect.after:
        return "as before, but a second try gives another result"
    return _difference(world, expect.on_from_after, "whole after a second try")


def _difference(world: World, on: Any, what: str) -> str:
    """Take the next steps: "" where they come to the state `on`."""
    try:
        world.go_on()
    except Exception as error:
        return f"{what}, but the next step raises {type(error).__name__}: {error}"
    return "" if world.state() == on else f"{what}, but the next steps differ"


def _reorders(expect: Expected) -> bool:
    """Whether the call takes weights away or gives them other owners, as `forget` and `replace` do."""
    before, after = ([(name, array[1]) for name, array in state[0]] for state in (expect.before, expect.after))
    return after[: len(before)] != before


def held_off() -> bool:
    """Whether a SIGINT would not be raised now."""
    masked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return masked or signal.getsignal(signal.SIGINT) is not _INTERRUPT


class _Tracer:
    """Looks at each executed line of gpu_adam; acts before line number `target`, counted from 0.

    Attributes:
        held: for each line executed so far whether signals were held off.
        place: where it acted, or None.
    """

    def __init__(self, target: int | None = None, act: Callable[[], None] | None = None) -> None:
        self._target, self._act = target, act
        self.held: list[bool] = []
        self.place: str | None = None

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_CODE) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            number = len(self.held)
            self.held.append(held_off() if self._target is None else False)
            if number == self._target and self._act is not None:
                code = frame.f_code
                self.place = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
                self._act()
        return self._line


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a program's main thread."""
    before = signal.signal(signal.SIGINT, _INTERRUPT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, before)


def _raise(error: type[BaseException]) -> None:
    raise error("injected")


_ACTS: dict[str, Callable[[], None]] = {
    "keyboard": lambda: _raise(KeyboardInterrupt),
    "memory": lambda: _raise(MemoryError),
    "signal": lambda: signal.raise_signal(signal.SIGINT),
}


def lines_of(factory: Factory) -> list[bool]:
    """For each line that the call executes whether signals are held off there. The first call warms caches up."""
    factory().call()
    world, tracer, before = factory(), _Tracer(), sys.gettrace()
    with interruptible():
        sys.settrace(tracer)
        try:
            world.call()
        finally:
            sys.settrace(before)
    return tracer.held


def trial(factory: Factory, expect: Expected, number: int, kind: str) -> str | None:
    """One disturbed call: why and where the world is torn; "" where it is whole, None where the line is not met."""
    with warnings.catch_warnings():
        # An interrupt that strikes as `with open(...)` ends leaves it to Python to close the file.
        warnings.simplefilter("ignore", ResourceWarning)
        # A context of its own: a differentiation that stays open must not reach the next trial.
        return contextvars.copy_context().run(_trial, factory, expect, number, kind)


def _trial(factory: Factory, expect: Expected, number: int, kind: str) -> str | None:
    world = factory()
    identities, tracer = world.identities(), _Tracer(number, _ACTS[kind])
    raised, before = False, sys.gettrace()
    with interruptible():
        try:
            sys.settrace(tracer)
            world.call()
        except BaseException:
            raised = True
        finally:
            sys.settrace(before)
        left_held = held_off()
    if tracer.place is None:
        return None
    if left_held:
        return f"{tracer.place}: signals are held off after the call"
    if not raised and kind != "memory":
        return f"{tracer.place}: the interrupt is lost"
    why = verdict(world, expect, identities, retry=number % 2 == 0)
    return why and f"{tracer.place}: {why}"


class Report(NamedTuple):
    """The trials of one scenario and kind.

    Attributes:
        lines: how many lines the call executes.
        held: on how many of these lines signals are held off.
        tried: on how many lines the call was disturbed.
        torn: why and where, for each trial that left a torn world.
    """

    lines: int
    held: int
    tried: int
    torn: list[str]


def disturb(factory: Factory, kind: str, most: int | None = None, short: int = 0, seed: int = 0) -> Report:
    """Disturb a call at each of its lines.

    Args:
        factory: of the worlds.
        kind: one of KINDS.
        most: try so many lines only, chosen by the seed, and as many about those where signals are held off.
        short: calls of so many lines or fewer are tried at each line nevertheless.
        seed: chooses the lines.
    """
    held = lines_of(factory)
    expect = expected(factory)
    numbers = [number for number, is_held in enumerate(held) if kind == "signal" or not is_held]
    if most is not None and len(numbers) > max(most, short):
        rng, close = random.Random(seed), [n for n in numbers if any(held[max(0, n - 3) : n + 4])]
        numbers = sorted({*rng.sample(numbers, most), *rng.sample(close, min(most, len(close)))})
    results = [trial(factory, expect, number, kind) for number in numbers]
    tried = [result for result in results if result is not None]
    return Report(len(held), sum(held), len(tried), [result for result in tried if result])


# Scenarios: each takes a device and gives a factory of worlds.

X, Y, Z = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2), np.arange(1, 4, dtype=np.float32), np.linspace(1, 2, 3)


def _gradients(device: Device, targets: list[Any], number: int) -> list[Any]:
    """Gradients of step `number`, unlike those of every other."""
    return [device.array(np.asarray(np.cos(np.arange(t.size) + number), t.dtype).reshape(t.shape)) for t in targets]


def _pairs(device: Device, targets: list[Any], number: int, sparse: bool) -> list[tuple[Any, Any]]:
    pairs = list(zip(_gradients(device, targets, number), targets, strict=True))
    if sparse:
        values = device.array(np.full((3, 2), number + 0.5, np.float32))
        pairs[0] = (IndexedSlices(values, device.array(np.array([2, 0, 2]))), targets[0])
    return pairs


def _two_steps(device: Device, sparse: bool = False) -> Callable[[World], None]:
    def go_on(world: World) -> None:
        for number in (10, 11):
            world.optimizer.apply_gradients(_pairs(device, world.targets, number, sparse))

    return go_on


def step_scenario(
    device: Device,
    steps: int,
    values: tuple[Any, ...] = (X, Y),
    *,
    raw: bool = False,
    sparse: bool = False,
    same: bool = False,
    **config: Any,
) -> Factory:
    """A step after `steps` others: of Variables or raw arrays, with new gradients or with the same list of pairs."""

    def factory() -> World:
        targets: list[Any] = [device.array(value) if raw else Variable(value, device=device) for value in values]
        optimizer = gpu_adam.Adam(0.1, **config)
        repeated = _pairs(device, targets, 0, sparse) if same else []
        for number in range(steps):
            optimizer.apply_gradients(repeated or _pairs(device, targets, number, sparse))

        # The same arrays where the call is made again; a first step's must not keep its variables alive.
        ready = repeated or (_pairs(device, targets, 5, sparse) if steps else [])

        def call(world: World) -> None:
            world.optimizer.apply_gradients(ready or _pairs(device, world.targets, 5, sparse))

        return World(optimizer, targets, call, _two_steps(device, sparse), 0 if steps else len(targets))

    return factory


def state_scenario(
    device: Device, call: Callable[[World], object], steps: int = 2, newcomers: int = 0, raw: bool = False
) -> Factory:
    """Another call than a step, after `steps` steps of two variables (and a third that no step has met)."""

    def factory() -> World:
        targets: list[Any] = [device.array(value) if raw else Variable(value, device=device) for value in (X, Y, Z)]
        optimizer = gpu_adam.Adam(0.1)
        for number in range(steps):
            optimizer.apply_gradients(_pairs(device, targets[:2], number, sparse=False))
        return World(optimizer, targets, call, _two_steps(device), newcomers)

    return factory


def _part(device: Device) -> Callable[[World], object]:
    """A step over one of the two variables of the steps before, whose launches are taken from those of both."""
    return lambda world: world.optimizer.apply_gradients(_pairs(device, world.targets[1:2], 5, sparse=False))


def _saved(device: Device, *, variables: bool = False) -> Callable[[World], object]:
    """The call of `load`: a file of an optimizer of the same variables that has done four steps."""
    folder = tempfile.mkdtemp()
    source = state_scenario(device, lambda world: None, steps=4)()
    path = Path(folder) / "state"
    source.optimizer.save(path, variables=variables)

    def load(world: World) -> None:
        world.optimizer.load(path, variables=variables)

    weakref.finalize(load, shutil.rmtree, folder)
    return load


def _set_weights(world: World) -> None:
    world.optimizer.set_weights([weight + 1 for weight in world.optimizer.get_weights()])


def _restore(world: World) -> None:
    world.optimizer.restore({name: array + 1 for name, array in world.optimizer.export().items()})


def _import_state(world: World) -> None:
    variables = world.targets[:2]
    state = export_state(world.optimizer, variables, legacy=True)
    import_state(world.optimizer, [array + 1 for array in state], variables)


def _set_group(world: World) -> None:
    world.optimizer.set_group([world.targets[0]], learning_rate_multiplier=2.0, weight_decay=0.1)


def _set_iterations(world: World) -> None:
    world.optimizer.iterations = 41


def _own_counter(world: World) -> None:
    world.optimizer.iterations = Variable(np.int64(7), device="host")


def sums_scenario(device: Device, call: Callable[[World], object], *, raw: bool = False) -> Factory:
    """A call while gradients are accumulated; the steps after it take what the sums hold."""

    def factory() -> World:
        targets: list[Any] = [device.array(value) if raw else Variable(value, device=device) for value in (X, Y)]
        optimizer = gpu_adam.Adam(0.1)
        optimizer.apply_gradients(_pairs(device, targets, 0, sparse=True))
        for number in (1, 2):
            optimizer.accumulate(_pairs(device, targets, number, sparse=True))

        def go_on(world: World) -> None:
            world.optimizer.accumulate(_pairs(device, world.targets, 10, sparse=False))
            world.optimizer.apply_gradients()
            world.optimizer.apply_gradients(_pairs(device, world.targets, 11, sparse=False))

        return World(optimizer, targets, call, go_on)

    return factory


class _Recognised(HostDevice):
    """The host with the reader of pairs that other devices have."""

    def pair_reader(self, expected: ExpectedPairs) -> PairReader:
        return Device.pair_reader(self, expected)


def _recognised(*arguments: Any, **options: Any) -> Callable[[Device], Factory]:
    return lambda device: step_scenario(_Recognised(threads=1), *arguments, **options)


def _minimize(world: World) -> None:
    one, other, *_ = world.targets
    world.optimizer.minimize(lambda: (one * one).sum() + (other * 3).sum(), [one, other])


def _replace(device: Device, raw: bool) -> Callable[[World], object]:
    """The first target gives way to two of its rows."""

    def replace(world: World) -> None:
        old, rows = world.targets[0], device.array(np.array([2, 0]))
        values = X[[2, 0]]
        world.successor = device.array(values) if raw else Variable(values, device=device)
        world.optimizer.replace(old, world.successor, rows)

    return replace


def _steps(*arguments: Any, **options: Any) -> Callable[[Device], Factory]:
    return lambda device: step_scenario(device, *arguments, **options)


def _calls(call: Callable[[World], object], *arguments: Any, **options: Any) -> Callable[[Device], Factory]:
    return lambda device: state_scenario(device, call, *arguments, **options)


def _of_deferred(call: Callable[[World], object]) -> Callable[[Device], Factory]:
    """A call after two deferred steps."""

    def scenario(device: Device) -> Factory:
        factory = step_scenario(device, 2, (X,), sparse=True, sparse_update="deferred")

        def deferred() -> World:
            world = factory()
            return World(world.optimizer, world.targets, call, _two_steps(device, sparse=True))

        return deferred

    return scenario


def _build(world: World) -> None:
    world.optimizer.build(world.targets)


def _forget(world: World) -> None:
    world.optimizer.forget(world.targets[0])


SCENARIOS: dict[str, Callable[[Device], Factory]] = {
    **{
        f"{name} step{what}": _steps(steps, *values, **options)
        for name, steps in (("first", 0), ("later", 2))
        for what, values, options in (
            ("", (), {}),
            (", clipnorm", (), {"clipnorm": 0.5}),
            (", global norm", (), {"global_clipnorm": 0.5}),
            (", sparse", ((X,),), {"sparse": True}),
            (", mixed", ((X, Y, Z, Z + 2),), {"sparse": True, "amsgrad": True}),
            (", deferred", ((X,),), {"sparse": True, "sparse_update": "deferred", "max_deferral": 2}),
            (", raw", (), {"raw": True}),
            (", guarded", (), {"loss_scale": gpu_adam.LossScale(4.0, 2), "telemetry": True, "clipnorm": 0.5}),
        )
    },
    "same step": _steps(2, same=True),
    "same step, raw": _steps(2, same=True, raw=True),
    "same step, clipnorm": _steps(2, same=True, clipnorm=0.5),
    "later step, Python's reader": _recognised(2),
    "same step, Python's reader": _recognised(2, same=True),
    "step over a new set": lambda device: state_scenario(device, _part(device), newcomers=1),
    "step over a new set, raw": lambda device: state_scenario(device, _part(device), newcomers=1, raw=True),
    "accumulate": lambda device: sums_scenario(
        device, lambda world: world.optimizer.accumulate(_pairs(device, world.targets, 5, sparse=False))
    ),
    "accumulated step": lambda device: sums_scenario(device, lambda world: world.optimizer.apply_gradients()),
    "accumulated step, raw": lambda device: sums_scenario(
        device, lambda world: world.optimizer.apply_gradients(), raw=True
    ),
    "build": _calls(_build, steps=0, newcomers=3),
    "build, raw": _calls(_build, steps=0, newcomers=3, raw=True),
    "build, one more": _calls(_build, newcomers=1),
    "set_weights": _calls(_set_weights),
    "restore": _calls(_restore),
    "import_state": _calls(_import_state),
    "set_group": _calls(_set_group),
    "load": lambda device: state_scenario(device, _saved(device)),
    "load, variables": lambda device: state_scenario(device, _saved(device, variables=True)),
    "iterations =": _calls(_set_iterations),
    "iterations =, fresh": _calls(_set_iterations, steps=0),
    "iterations = Variable": _calls(_own_counter, steps=0),
    "add_slot": _calls(lambda world: world.optimizer.add_slot(world.targets[0], "note", "ones")),
    "add_slot, stranger": _calls(
        lambda world: world.optimizer.add_slot(world.targets[2], "note", "ones"), newcomers=1, raw=True
    ),
    "minimize": _calls(_minimize),
    "minimize, first": _calls(_minimize, steps=0),
    "forget": _calls(_forget),
    "forget, raw": _calls(_forget, raw=True),
    "replace": lambda device: state_scenario(device, _replace(device, raw=False)),
    "forget, deferred": _of_deferred(_forget),
    "assign, deferred": _of_deferred(lambda world: world.targets[0].assign(X[::-1] + 5)),
    "replace, raw": lambda device: state_scenario(device, _replace(device, raw=True), raw=True),
}
"""Each operation that must not be torn, by name: a device gives its factory."""


def main() -> None:
    """Print the whole table: every line of every operation, for each kind."""
    names = sys.argv[1:]
    print(f"{'operation':32} {'lines':>6} {'held':>5} " + " ".join(f"{kind + ': tried, torn':>22}" for kind in KINDS))
    torn = 0
    begin = time.monotonic()
    for name, scenario in SCENARIOS.items():
        if names and name not in names:
            continue
        try:
            reports = [disturb(scenario(gpu_adam.get_device()), kind) for kind in KINDS]
        except AttributeError as error:
            print(f"{name:32} {error}")
            torn += 1
            continue
        cells = " ".join(f"{report.tried:>15} {len(report.torn):>6}" for report in reports)
        print(f"{name:32} {reports[0].lines:>6} {reports[0].held:>5} {cells}", flush=True)
        torn += sum(len(report.torn) for report in reports)
        if names:
            print(*(f"    {why}" for report in reports for why in report.torn), sep="\n")
    print(f"torn: {torn} ({time.monotonic() - begin:.0f} s)")
    sys.exit(bool(torn))


if __name__ == "__main__":
    main()
