"""gpu_adam.torch.Adam and AdamW under torch.amp.GradScaler, whose flag the host never reads.

The host device knows at once which steps were left out. Here its reports come late, as those of a GPU do. How far two
implementations may be apart is said in test_torch_optimizer.py.
"""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_adam.devices import HostDevice
from gpu_adam.errors import ArgumentValueError

torch: Any = pytest.importorskip("torch", reason="torch is not installed (extra: torch)")
ours: Any = pytest.importorskip("gpu_adam.torch")

from test_torch_optimizer import KINDS, LR, allowed, assert_near, give, made, plan_of, steps_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

STEPS = 200
LAGS = [0, 3, 10**9]
"""How many reports are on their way at most; all of them, until somebody waits."""
SCALES = (1024.0, 3072.0, 0.125)


class Late:
    """Copies of an array of which the last ones have not come yet.

    Attributes:
        waited: how often somebody waited for copies that were not there.
    """

    def __init__(self, array: Any, lag: int) -> None:
        self._array, self._lag = array, lag
        self._made: list[Any] = []
        self.waited = 0

    def _copy(self) -> None:
        self._made.append(self._array.copy())

    def calls(self) -> list[Any]:
        """As `ReadBack`."""
        return [functools.partial(self._copy)]

    def read(self, *, waits: bool) -> tuple[int, Any]:
        """As `ReadBack`."""
        there = max(0, len(self._made) - self._lag)
        if waits and there < len(self._made):
            self.waited += 1
            there = len(self._made)
        return there, self._made[there - 1] if there else np.zeros(0, np.uint8)

    def forget(self, number: int) -> list[Any]:
        """As `ReadBack`."""
        return [functools.partial(self._made.__delitem__, slice(number))]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Late]]:
    """Lets reports come late from now on; the list has those of each guard."""
    found: list[Late] = []

    def begin(lag: int) -> list[Late]:
        def read_back(_: HostDevice, array: Any) -> Late:
            found.append(Late(array, lag))
            return found[-1]

        monkeypatch.setattr(HostDevice, "read_back", read_back)
        return found

    return begin


def step_scaled(optimizer: Any, scale: Any, flag: float, shape: tuple[int, ...] = ()) -> None:
    """A step as GradScaler makes it, with gradients that are multiplied by the scale already."""
    optimizer.grad_scale = None if scale is None else torch.full(shape, scale)
    optimizer.found_inf = torch.full(shape, flag)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def spoil(scale: float, flag: float, *lists: list[Any]) -> None:
    """Multiply gradients by a scale, and let an element be infinite where the flag says so."""
    for params in lists:
        gradients = [p.grad for p in params if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(scale)
        if flag:
            gradients[0].view(-1)[0] = float("inf")


def flag_of(step: int) -> float:
    """Steps that are left out: some in a row, the first one among them."""
    return float(step in (0, 1, 5) or step % 7 == 3 or 50 < step < 54)


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("kind", KINDS)
def test_beside_the_fused_one_of_torch(kind: str, lag: int, late: Callable[[int], list[Late]]) -> None:
    """Several groups, parameters that come late or pause, and states that are read in between."""
    late(lag)
    theirs, mine = made(), made()
    other, optimizer = (
        getattr(of, kind)(
            [
                {"params": params[:2], "lr": 0.02},
                {"params": params[2:4], "betas": (0.8, 0.9), "weight_decay": 0.1},
                {"params": params[4:], "eps": 1e-2},
            ],
            LR,
            fused=True,
        )
        for of, params in ((torch.optim, theirs), (ours, mine))
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        without = {4 if step < 20 else None, 1 if step % 40 > 30 else None, 5 if step in (60, 62, 63) else None}
        give(generator, theirs, mine, but=without)
        flag, scale = flag_of(step), SCALES[step % len(SCALES)]
        spoil(scale, flag, theirs, mine)
        step_scaled(other, scale, flag)
        step_scaled(optimizer, scale, flag, () if step % 2 else (1,))
        if step % 50 == 49:
            assert steps_of(optimizer) == steps_of(other)
            state, expected = optimizer.state_dict()["state"], other.state_dict()["state"]
            assert [float(entry["step"]) for entry in state.values()] == [
                float(entry["step"]) for entry in expected.values()
            ]
    assert_near(theirs, mine, allowed(STEPS, torch.float32, theirs, 0.02))
    assert max(steps_of(other)) == STEPS - sum(map(flag_of, range(STEPS)))


def copied(optimizer: Any, params: list[Any], way: str) -> tuple[Any, list[Any]]:
    """The optimizer going on elsewhere, with the parameters that it has there."""
    if way == "state_dict":
        params = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = type(optimizer)(params, 0.5)
        other.load_state_dict(optimizer.state_dict())
        return other, params
    if way == "itself":
        optimizer.load_state_dict(optimizer.state_dict())
        return optimizer, params
    copy_of: Callable[[Any], Any] = copy.deepcopy if way == "copy" else lambda x: pickle.loads(pickle.dumps(x))
    other = copy_of(optimizer)
    return other, [p for group in other.param_groups for p in group["params"]]


@pytest.mark.parametrize("way", ["state_dict", "itself", "copy", "pickle"])
def test_the_state_goes_on_elsewhere(way: str, late: Callable[[int], list[Late]]) -> None:
    late(LAGS[-1])
    theirs, mine = made(), made()
    other, optimizer = torch.optim.Adam(theirs, LR, fused=True), ours.Adam(mine, LR)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        if step == 6:
            optimizer, mine = copied(optimizer, mine, way)
        give(generator, theirs, mine, but={0 if step < 3 else None})
        spoil(8.0, flag_of(step), theirs, mine)
        for each in (other, optimizer):
            step_scaled(each, 8.0, flag_of(step))
    assert steps_of(optimizer) == steps_of(other)
    assert_near(theirs, mine, allowed(12, torch.float32, theirs))


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("choice", [{}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "complex64"])
def test_the_bits_are_those_of_gradients_that_were_divided_before(
    dtype: str, choice: dict[str, Any], lag: int, late: Callable[[int], list[Late]]
) -> None:
    """By a scale whose reciprocal is a number of every dtype."""
    late(lag)
    lists = [made(dtype=getattr(torch, dtype)) for _ in range(2)]
    scaled, plain = (ours.AdamW(params, LR, **choice) for params in lists)
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        give(generator, *lists, but={3 if step % 9 == 8 else None})
        spoil(16.0, flag_of(step), lists[0])
        step_scaled(scaled, 16.0, flag_of(step))
        if not flag_of(step):
            plain.step()
    assert steps_of(scaled) == steps_of(plain)
    for one, other in zip(*lists, strict=True):
        assert torch.equal(one.detach(), other.detach())
        assert all(torch.equal(scaled.state[one][name], each) for name, each in plain.state[other].items())


def test_no_step_waits(late: Callable[[int], list[Late]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor reads a tensor; reading the state waits once."""
    reports, params = late(LAGS[-1]), made()
    optimizer = ours.Adam([{"params": params[:2], "lr": 0.1}, {"params": params[2:]}])
    scale, flags = torch.tensor(8.0), [torch.tensor(flag_of(step)) for step in range(20)]
    launches = set()
    with monkeypatch.context() as patch:
        for name in ("item", "__float__", "__bool__", "cpu", "tolist"):
            patch.setattr(torch.Tensor, name, None)
        for flag in flags:
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.grad_scale, optimizer.found_inf = scale, flag
            optimizer.step()
            launches.add(id(plan_of(optimizer)._launches))
    (report,) = reports
    assert report.waited == 0
    assert len(launches) == 1
    expected = [20 - sum(map(flag_of, range(20)))] * len(params)
    assert steps_of(optimizer) == expected
    assert report.waited == 1
    assert steps_of(optimizer) == expected
    assert report.waited == 1


def test_other_parameters_are_waited_for_once(late: Callable[[int], list[Late]]) -> None:
    """What was left out is then no longer the same for all."""
    (params, reports) = made([(3,), (3,)]), late(LAGS[-1])
    optimizer = ours.Adam(params)
    for step in range(12):
        params[0].grad = torch.ones(3)
        params[1].grad = None if 4 <= step < 8 else torch.ones(3)
        step_scaled(optimizer, 1.0, float(step in (2, 5, 6, 9)))
    assert reports[0].waited == 2
    assert steps_of(optimizer) == [8, 6]


def test_steps_with_and_without_a_scaler(late: Callable[[int], list[Late]]) -> None:
    late(LAGS[-1])
    theirs, mine = made(), made()
    other, optimizer = torch.optim.AdamW(theirs, LR, fused=True), ours.AdamW(mine, LR)
    generator = torch.Generator().manual_seed(1)
    for step in range(24):
        give(generator, theirs, mine)
        for each in (other, optimizer):
            if step % 8 < 4:
                step_scaled(each, None, flag_of(step))
            else:
                each.step()
    assert steps_of(optimizer) == steps_of(other)
    assert_near(theirs, mine, allowed(24, torch.float32, theirs))


def test_counts_and_parameters_that_are_put_there_in_between(late: Callable[[int], list[Late]]) -> None:
    """Whoever reads `state` writes into counts that are right."""
    late(LAGS[-1])
    theirs, mine = made(), made()
    other, optimizer = torch.optim.Adam(theirs[:4], LR, fused=True), ours.Adam(mine[:4], LR)
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        for each, params in ((other, theirs), (optimizer, mine)):
            if step == 6:
                each.state[params[0]]["step"] += 5
            if step == 11:  # after one that was left out
                each.param_groups[0]["params"].append(params[4])
            if step == 12:
                each.add_param_group({"params": params[5:], "lr": 0.5 * LR})
            if step == 18:
                each.state[params[2]]["exp_avg"] = torch.ones_like(params[2])
            if step == 24:
                each.state[params[1]]["step"] = torch.tensor(3.0)
        give(generator, theirs, mine)
        spoil(8.0, flag_of(step), theirs, mine)
        for each in (other, optimizer):
            step_scaled(each, 8.0, flag_of(step))
    assert steps_of(optimizer) == steps_of(other)
    assert_near(theirs, mine, allowed(30, torch.float32, theirs))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_groups_with_and_without_amsgrad(shape: tuple[int, ...], late: Callable[[int], list[Late]]) -> None:
    """Two launches, for which the host reads the flag."""
    reports, theirs, mine = late(LAGS[-1]), made(), made()
    other, optimizer = (
        of.Adam([{"params": params[:3], "amsgrad": True}, {"params": params[3:]}], LR, fused=True)
        for of, params in ((torch.optim, theirs), (ours, mine))
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        give(generator, theirs, mine)
        spoil(8.0, flag_of(step), theirs, mine)
        step_scaled(other, 8.0, flag_of(step))
        step_scaled(optimizer, 8.0, flag_of(step), shape)
    assert not reports
    assert steps_of(optimizer) == steps_of(other)
    assert_near(theirs, mine, allowed(20, torch.float32, theirs))


def test_numbers_in_the_places_of_tensors() -> None:
    params = made([(3,)])
    optimizer = ours.Adam(params, LR)
    before = params[0].detach().clone()
    params[0].grad = torch.ones(3)
    optimizer.grad_scale, optimizer.found_inf = 8.0, 1
    optimizer.step()
    assert torch.equal(params[0].detach(), before)
    optimizer.found_inf = 0
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], torch.full((3,), 0.125 * (1 - 0.9)))
    optimizer.grad_scale = -8.0
    with pytest.raises(ArgumentValueError, match="grad_scale must be > 0"):
        optimizer.step()
    assert steps_of(optimizer) == [1]


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("lag", LAGS)
def test_grad_scaler(lag: int, unscales: bool, late: Callable[[int], list[Late]]) -> None:
    """With a model, beside torch's; its unscale_ comes before clipping. It never waits for this optimizer."""
    reports = late(lag)
    results = []
    for of in (torch.optim, ours):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = of.AdamW(model.parameters(), LR, eps=1e-3, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10)
        x = torch.linspace(-1, 1, 24).reshape(8, 3)
        for step in range(60):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean() * (float("inf") if step % 13 == 5 else 1.0)
            scaler.scale(loss).backward()
            if unscales:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        assert [report.waited for report in reports] == ([0] if of is ours else [])
        assert steps_of(optimizer) == [55] * 4
        results.append((scaler.get_scale(), list(model.parameters())))
    assert results[0][0] == results[1][0] != 1024.0
    # An error of a parameter is handed on to the next gradients; eps bounds by how much they are enlarged.
    assert_near(results[0][1], results[1][1], 20 * allowed(60, torch.float32, results[0][1]))
