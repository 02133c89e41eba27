"""Time: what a sample is, by which clock it is taken, and what is reported of many samples."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Step = Callable[[], Any]
_LONGEST_BURST = 10_000
_TICKS = 0.012  # at ticks, every 1 to 10 ms, systems note the time of threads that run, and spread them over processors
_SLEEPS = 5
_SHORT = 0.1  # beyond it does not matter what waking threads takes


class Clock(Protocol):
    """Measures what a function enqueues."""

    def __call__(self, run: Callable[[], None]) -> float:
        """Seconds from the start of the first to the end of the last thing that `run` enqueues."""


class WallClock:
    """The monotonic clock of the host.

    Args:
        wait: returns when everything is done.
    """

    def __init__(self, wait: Callable[[], Any]) -> None:
        self._wait = wait

    def __call__(self, run: Callable[[], None]) -> float:
        """Seconds until the wait is over."""
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start


class CudaEvents:
    """Two CUDA events in a CuPy stream, around what is enqueued there.

    Args:
        cuda: the module ``cupy.cuda``.
        stream: made the current stream while the function runs.
    """

    def __init__(self, cuda: Any, stream: Any) -> None:
        self._cuda, self.stream = cuda, stream
        self._start, self._end = cuda.Event(), cuda.Event()

    def __call__(self, run: Callable[[], None]) -> float:
        """Seconds between the events, on the device's clock."""
        with self.stream:
            self._start.record(self.stream)
            run()
            self._end.record(self.stream)
            self._end.synchronize()
        return float(self._cuda.get_elapsed_time(self._start, self._end)) * 1e-3


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        repetitions: samples, at least.
        most: samples, at most.
        seconds: between the two, samples are taken for that long.
        burst_seconds: a sample is as many steps as fill this time, so that what a clock takes itself does not count,
            nor what the first step takes until it has reached an idle device.
        sets: sets of inputs by turns, at most; as many as fill the caches twice.
    """

    repetitions: int = 20
    most: int = 200
    seconds: float = 1.0
    burst_seconds: float = 2e-4
    sets: int = 16


@dataclass(frozen=True)
class Summary:
    """Seconds of one step: median and quartiles of the samples.

    Attributes:
        repetitions: number of samples.
        burst: steps of each sample.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    repetitions: int
    burst: int = 1

    @classmethod
    def of(cls, seconds: Sequence[float], burst: int = 1) -> Summary:
        """Of samples that are seconds per step."""
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        return cls(median, low, high, len(seconds), burst)


@dataclass
class Candidate:
    """Somebody's step, to be timed.

    Attributes:
        name: who it is.
        steps: one for each set of inputs.
        clock: by which it is timed.
        samples: seconds per step so far.
        burst: steps per sample.
        executed: steps so far, those of the warm-up included.
    """

    name: str
    steps: Sequence[Step]
    clock: Clock
    samples: list[float] = field(default_factory=list)
    burst: int = 1
    executed: int = 0
    _turn: Iterator[Step] | None = None

    def warm_up(self, effort: Effort) -> None:
        """Run every set's step, three at least, and find the length of a burst."""
        self._turn = itertools.cycle(self.steps)
        self.burst = max(3, len(self.steps))
        self._sample()
        # Twice, because in a few steps that which counts once per burst makes a step look longer than it is.
        for _ in range(2):
            wanted = math.ceil(effort.burst_seconds / max(self._sample(), 1e-9))
            self.burst = max(1, min(_LONGEST_BURST, wanted))

    def settle(self) -> None:
        """Let the threads of the candidate before go to sleep, and wake one's own: each is timed as if alone."""
        _until_threads_sleep()
        if self._turn is not None and self.samples and self.samples[-1] < _SHORT:
            spent = 0.0
            while spent < _TICKS:
                spent += self.clock(next(self._turn))
                self.executed += 1

    def measure(self) -> None:
        """Take one sample."""
        self.samples.append(self._sample())

    def _sample(self) -> float:
        turn = self._turn
        assert turn is not None
        steps = [next(turn) for _ in range(self.burst)]

        def run() -> None:
            for step in steps:
                step()

        self.executed += self.burst
        return self.clock(run) / self.burst

    @property
    def summary(self) -> Summary:
        """Of the samples."""
        return Summary.of(self.samples, self.burst)


def _until_threads_sleep() -> None:
    """Wait until no thread of this process works: OpenMP's spin after theirs, torch's for up to 10 ms."""
    for _ in range(_SLEEPS):
        wall, worked = time.perf_counter(), time.process_time()
        time.sleep(_TICKS)
        if time.process_time() - worked < 0.1 * (time.perf_counter() - wall):
            break


def measure(candidates: Sequence[Candidate], effort: Effort, tick: Callable[[], None] = lambda: None) -> None:
    """Sample candidates by turns, so that a machine that is busy for a while slows all of them alike."""
    for candidate in candidates:
        if not candidate.executed:
            candidate.warm_up(effort)
    start = time.perf_counter()
    for number in range(effort.most):
        if number >= effort.repetitions and time.perf_counter() - start > effort.seconds * len(candidates):
            break
        for candidate in candidates:
            if len(candidates) > 1:
                candidate.settle()
            candidate.measure()
        tick()
