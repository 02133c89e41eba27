"""Interrupted calls: wherever Ctrl-C strikes, the optimizer is as before the call or as after it, and goes on.

Every line of the short calls is tried, and a sample of the lines of the others; GPU_ADAM_EVERY_LINE=1 tries all, and
`python tests/injection.py` prints the table.
"""

import os
import random
import signal
import threading
from types import FrameType
from typing import Any

import injection
import numpy as np
import pytest
import reference
from injection import KINDS, SCENARIOS

import gpu_adam
from gpu_adam import Variable
from gpu_adam.devices import Device

MOST = None if os.environ.get("GPU_ADAM_EVERY_LINE") else 20
SHORT = {"signal": 270}
"""Lines of a call that is tried at each of its lines: by signals, the kind that programs meet."""


@pytest.fixture(autouse=True)
def _not_emulated(request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("device") if "device" in request.fixturenames else None
    if getattr(getattr(device, "xp", None), "__emulated__", False):
        pytest.skip("needs a real GPU: an emulated driver is Python, in the lines of which interrupts strike as well")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_call_is_whole_or_has_not_been(device: Device, name: str, kind: str) -> None:
    report = injection.disturb(SCENARIOS[name](device), kind, MOST, SHORT.get(kind, 0), KINDS.index(kind))
    assert report.torn == [], f"{len(report.torn)} of {report.tried} lines tear {name!r}"
    assert report.tried >= 5, "the harness must have met the call's lines"


@pytest.mark.parametrize("name", SCENARIOS)
def test_signals_are_held_off_for_a_short_stretch_only(device: Device, name: str) -> None:
    """A call that held signals off from end to end would be whole, and deaf."""
    held = injection.lines_of(SCENARIOS[name](device))
    assert sum(held) <= max(40, 0.7 * len(held))


@pytest.mark.parametrize("steps", [0, 2])
def test_code_of_the_caller_and_compilers_can_be_interrupted(device: Device, steps: int) -> None:
    """Signals are held off neither in a caller's functions nor while kernels are compiled, which takes seconds."""
    seen: list[str] = []

    def look(what: str) -> None:
        assert not injection.held_off(), what
        seen.append(what)

    def rate() -> float:
        look("rate")
        return 0.1

    def pairs() -> Any:
        look("pairs")
        yield device.array(np.ones(3)), variable

    prepare = device.prepare

    def watched(*arguments: Any) -> Any:
        look("prepare")
        return prepare(*arguments)

    variable, optimizer = Variable(np.ones(3)), gpu_adam.Adam(rate)
    with injection.interruptible(), pytest.MonkeyPatch.context() as patch:
        for _ in range(steps):
            optimizer.apply_gradients(pairs())
        seen.clear()
        patch.setattr(device, "prepare", watched)
        optimizer.apply_gradients(pairs())
    assert set(seen) == ({"rate", "pairs"} if steps else {"rate", "pairs", "prepare"})


class Struck(BaseException):
    """What the handler of the timer raises."""


def strike(number: int, frame: FrameType | None) -> None:
    """Raise, but only inside of `apply_gradients`: a late alarm must not reach the test itself."""
    while frame is not None:
        if frame.f_code is gpu_adam.Adam.apply_gradients.__code__:
            raise Struck
        frame = frame.f_back


@pytest.mark.parametrize("config", [{}, {"clipnorm": 1e6}, {"amsgrad": True}], ids=["plain", "clipnorm", "amsgrad"])
def test_a_timer_that_strikes_during_steps(device: Device, config: dict[str, Any]) -> None:
    """Variables, slots and counter agree after each of 30 interrupts: all have done as many steps as the counter says.

    Every element has the same value and gradient, so one element of the oracle stands for all. The alarm goes to the
    process: any thread may take it, such as the idle one, and Python's handler runs in this thread all the same.
    """
    ready = threading.Event()
    size, interrupts, tries, rng = 2_000_000, 0, 0, random.Random(5)
    variable = Variable(np.ones(size, np.float32))
    optimizer, oracle = gpu_adam.Adam(0.1, **config), reference.Adam([np.ones(1, np.float32)], 0.1)
    pairs = [(device.array(np.ones(size, np.float32)), variable)]
    optimizer.apply_gradients(pairs)
    oracle.step([np.ones(1, np.float32)])
    idle = threading.Thread(target=ready.wait)
    idle.start()
    before = signal.signal(signal.SIGALRM, strike)
    try:
        while interrupts < 30 and tries < 600:
            tries += 1
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 2.5e-3))
            try:
                optimizer.apply_gradients(pairs)
                struck = False
            except Struck:
                struck = True
            signal.setitimer(signal.ITIMER_REAL, 0)
            done = int(optimizer.iterations)
            assert done - oracle.iterations in ((0, 1) if struck else (1,))
            if done > oracle.iterations:
                oracle.step([np.ones(1, np.float32)])
            if struck:
                interrupts += 1
                arrays = [variable, *optimizer.weights[1:3]]
                for array, expected in zip(arrays, [*oracle.variables, *oracle.m, *oracle.v], strict=False):
                    values = array.numpy()
                    assert (values == expected).all(), f"after {done} steps: {np.unique(values)}, expected {expected}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        ready.set()
        idle.join()
    assert interrupts == 30
