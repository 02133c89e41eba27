"""Samples, bursts and turns; no time is asserted."""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from gpu_adam.bench import clocks
from gpu_adam.bench.clocks import Candidate, Effort, Summary, WallClock, measure


def test_summary_is_median_and_quartiles() -> None:
    summary = Summary.of([1.0, 2.0, 3.0, 4.0, 100.0], 7)
    assert (summary.median, summary.repetitions, summary.burst) == (3.0, 5, 7)
    assert summary.lower_quartile < summary.median < summary.upper_quartile
    assert Summary.of([2.0]) == Summary(2.0, 2.0, 2.0, 1)


def test_candidates_take_turns_over_their_sets() -> None:
    calls: list[str] = []
    clock = WallClock(lambda: calls.append("wait"))
    made = [Candidate(name, [functools.partial(calls.append, name + s) for s in "12"], clock) for name in "ab"]
    measure(made, Effort(repetitions=4, most=4, seconds=0.0, burst_seconds=0.0))
    assert [len(each.samples) for each in made] == [4, 4]
    kept = [call for call in calls if call != "wait"]
    assert kept.count("a1") == pytest.approx(kept.count("a2"), abs=1)
    assert made[0].executed == kept.count("a1") + kept.count("a2")
    assert kept[:4] == ["a1", "a2", "a1", "a2"][:4]


def test_a_burst_fills_the_time_it_is_given() -> None:
    seconds = iter([0.4, 0.1, *[1.0] * 100])
    candidate = Candidate("c", [lambda: None], lambda run: next(seconds))
    measure([candidate], Effort(repetitions=2, most=2, seconds=0.0, burst_seconds=1.0))
    assert candidate.burst == 30  # 0.1 s for 3 steps
    assert candidate.samples == [1.0 / 30] * 2


def test_what_the_first_step_waits_for_does_not_count() -> None:
    """The clock of an idle device starts before the first step has reached it."""
    latency, step, fills = 5e-5, 1e-5, 2e-2
    done: list[int] = []

    def clock(run: Callable[[], None]) -> float:
        done.clear()
        run()
        return latency + len(done) * step

    candidate = Candidate("c", [functools.partial(done.append, 0)], clock)
    measure([candidate], Effort(repetitions=2, most=2, seconds=0.0, burst_seconds=fills))
    assert candidate.burst * step + latency >= 0.99 * fills
    assert step < candidate.summary.median < step * (1 + 1.01 * latency / fills)


def test_sampling_goes_on_for_the_given_time() -> None:
    candidate = Candidate("c", [lambda: None], lambda run: 1e-3)
    measure([candidate], Effort(repetitions=3, most=11, seconds=60.0, burst_seconds=0.0))
    assert len(candidate.samples) == 11


@pytest.mark.parametrize(("spins", "sleeps"), [(0, 1), (7, 2), (30, 4), (1000, 5)])
@pytest.mark.parametrize("step", [5e-3, 1.0])
def test_a_candidate_begins_when_the_threads_of_the_one_before_sleep(
    monkeypatch: pytest.MonkeyPatch, spins: int, sleeps: int, step: float
) -> None:
    """However long a step is; but not without end. Short steps are preceded by some that wake their own threads."""
    slept: list[float] = []

    def worked() -> float:
        return min(sum(slept), spins * 1e-3)  # what one thread has that spins for so many milliseconds

    now = SimpleNamespace(sleep=slept.append, perf_counter=lambda: sum(slept), process_time=worked)
    monkeypatch.setattr(clocks, "time", now)
    waited: list[int] = []

    def clock(run: Callable[[], None]) -> float:
        waited.append(len(slept))
        slept.clear()
        return step

    made = [Candidate(name, [lambda: None], clock) for name in "ab"]
    measure(made, Effort(repetitions=2, most=2, seconds=0.0, burst_seconds=0.0))
    assert [count for count in waited if count] == [sleeps] * 4  # both candidates, two samples each
    assert len(waited) == 2 * (3 + 2) + (2 * 3 if step < 0.1 else 0)  # of 5 ms, for 12 ms
