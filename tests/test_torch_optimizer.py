"""gpu_adam.torch.Adam and AdamW beside torch's own: numbers, counts, states, and all that torch.optim.Optimizer offers.

How far two right implementations may be apart after some steps with given gradients: each step rounds a parameter once,
by up to u |θ|, where u is half the distance from 1 to its neighbour. The update before that has up to 20 roundings (the
means, the root, the quotient, and the step's scalars), each of up to u times its size, which is about lr: gradients are
of one size, so that neither mean cancels by much. Two implementations may err in opposite directions.
"""

import copy
import io
import pickle
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpu_adam
from gpu_adam.devices import Device, HostDevice
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError

torch: Any = pytest.importorskip("torch", reason="torch is not installed (extra: torch)")
ours: Any = pytest.importorskip("gpu_adam.torch")

pytestmark = pytest.mark.usefixtures("one_torch_thread")

STEPS = 100
LR = 0.01
KINDS = ["Adam", "AdamW"]
SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (2, 3, 4), (4100,), (0, 3)]


def allowed(steps: int, dtype: Any, params: list[Any], lr: float = LR) -> float:
    """See above."""
    largest = max((float(p.detach().abs().max()) for p in params if p.numel()), default=0.0)
    return float(steps * torch.finfo(dtype).eps * (largest + 20 * lr))


def made(shapes: list[tuple[int, ...]] = SHAPES, dtype: Any = None, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if dtype is None else dtype
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]


def give(generator: Any, *lists: list[Any], but: Any = ()) -> None:
    """The same random gradients to the parameters of each list, none to those at some places."""
    for place, params in enumerate(zip(*lists, strict=True)):
        first = params[0]
        gradient = torch.randn(first.shape, dtype=first.dtype, generator=generator)
        gradient += 0.5  # so that the mean does not vanish beside its rounding
        for param in params:
            param.grad = None if place in but else gradient.clone()


def assert_near(one: list[Any], other: list[Any], bound: float) -> None:
    for place, (x, y) in enumerate(zip(one, other, strict=True)):
        difference = float((x.detach() - y.detach()).abs().max()) if x.numel() else 0.0
        assert difference <= bound, f"parameter {place}: {difference} apart, {bound} allowed"


def steps_of(optimizer: Any) -> list[float]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0 for p in params]


CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "weight decay": {"weight_decay": 0.1},
    "everything": {"amsgrad": True, "maximize": True, "weight_decay": 0.3, "betas": (0.5, 0.75), "eps": 1e-3},
    "no decay": {"weight_decay": 0.0},
}


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        *((choice, "float32") for choice in CHOICES),
        *(("everything", d) for d in ("float64", "complex64", "complex128")),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_beside_torch(kind: str, choice: str, dtype: str) -> None:
    dtype = getattr(torch, dtype)
    theirs, mine = made(dtype=dtype), made(dtype=dtype)
    other, optimizer = (getattr(of, kind)(p, LR, **CHOICES[choice]) for of, p in ((torch.optim, theirs), (ours, mine)))
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        give(generator, theirs, mine)
        other.step()
        optimizer.step()
    assert_near(theirs, mine, allowed(STEPS, dtype, theirs))
    assert steps_of(optimizer) == [float(STEPS)] * len(mine)
    for p, q in zip(theirs, mine, strict=True):
        assert list(optimizer.state[q]) == list(other.state[p])
        for name in list(other.state[p])[1:]:
            assert optimizer.state[q][name].dtype == other.state[p][name].dtype
            assert_near(
                [other.state[p][name]], [optimizer.state[q][name]], allowed(STEPS, dtype, [other.state[p][name]])
            )


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_schedules_and_gradients_that_come_late_or_pause(kind: str, amsgrad: bool) -> None:
    """Everything at once: torch counts each parameter, and each group has all numbers of its own."""
    theirs, mine = made(), made()
    optimizers, schedules = [], []
    for of, params in ((torch.optim, theirs), (ours, mine)):
        groups = [
            {"params": params[:2], "lr": 0.02},
            {"params": params[2:4], "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": amsgrad},
            {"params": [], "lr": 1.0},
            {"params": params[4:], "eps": 1e-2, "maximize": True},
        ]
        optimizer = getattr(of, kind)(groups, LR)
        optimizers.append(optimizer)
        schedules.append(torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.02, LR, 1.0, LR], total_steps=STEPS + 1))
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        without = {4 if step < 7 else None, 1 if step % 3 == 1 else None, 5 if 20 < step < 30 else None}
        give(generator, theirs, mine, but=without)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert steps_of(optimizers[1]) == steps_of(optimizers[0]) == [100, 67, 100, 100, 93, 91, 100]
    assert_near(theirs, mine, allowed(STEPS, torch.float32, theirs, 0.02))


def test_a_parameter_that_has_never_had_a_gradient_has_no_state() -> None:
    params = made([(3,), (3,)])
    optimizer = ours.Adam(params)
    optimizer.step()
    assert not optimizer.state
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert list(optimizer.state) == [params[0]]
    assert torch.equal(params[1].detach(), made([(3,), (3,)])[1].detach())


# Launches.


def plan_of(optimizer: Any) -> Any:
    return optimizer._controller._memos._last.plan


def test_other_parameters_at_every_step() -> None:
    """A random half each time: soon every parameter has a history of its own."""
    results, counts = [], []
    for of in (torch.optim, ours):
        params, rng = made([(3,)] * 40), np.random.default_rng(0)
        optimizer = of.AdamW([{"params": params[:30]}, {"params": params[30:], "lr": 0.02}], LR)
        for step in range(20):
            give(torch.Generator().manual_seed(step), params, but=set(rng.permutation(40)[:20].tolist()))
            optimizer.step()
        results.append(params)
        counts.append(steps_of(optimizer))
    assert counts[0] == counts[1]
    assert len(set(counts[0])) > 4
    assert_near(results[0], results[1], allowed(20, torch.float32, results[0], 0.02))


def test_one_launch_for_all_groups() -> None:
    params = made([(3,)] * 6)
    groups = [{"params": params[n : n + 2], "lr": 0.1 + n, "betas": (0.1 * n, 0.9), "eps": 1.0 + n} for n in (0, 2, 4)]
    optimizer = ours.AdamW(groups)
    launches = set()
    for step in range(5):
        for p in params if step else params[1:]:
            p.grad = torch.ones(3)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
        if step:
            launches.add(id(plan_of(optimizer)._launches))
    assert len(launches) == len(plan_of(optimizer).groups) == 1
    assert steps_of(optimizer) == [4, 5, 5, 5, 5, 5]


def test_a_model_that_always_has_gradients_takes_the_fast_path() -> None:
    """Its scalars are passed by value, and gradients at the same addresses are not written anew."""
    params = made([(3,)] * 4)
    optimizer = ours.Adam(params)
    for p in params:
        p.grad = torch.ones(3)
    bound = set()
    for _ in range(4):
        optimizer.step()
        (update,) = plan_of(optimizer)._launches._updates
        bound.add(id(update._bound))
        assert not update.arguments.kind
    assert len(bound) <= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_of_16_bits_are_those_of_float32_rounded_at_every_step(kind: str, dtype: str) -> None:
    """Beside torch in float32, on the same parameters and gradients."""
    small = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    params = made(dtype=small)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer, other = getattr(ours, kind)(params, LR), getattr(torch.optim, kind)(wide, LR)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        give(generator, params)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
            w.data.copy_(p.data)
        optimizer.step()
        other.step()
        for p, w in zip(params, wide, strict=True):
            largest = float(w.detach().abs().max()) if w.numel() else 0.0
            assert_near([p.float()], [w], torch.finfo(small).eps / 2 * (largest + LR))
    assert optimizer.state[params[3]]["exp_avg"].dtype == torch.float32
    assert_near([optimizer.state[params[3]]["exp_avg"]], [other.state[wide[3]]["exp_avg"]], 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moments_of_parameters_of_16_bits_are_loaded_as_they_are(dtype: str) -> None:
    """And those that torch has rounded to the parameters' dtype as well."""
    params = made([(3, 5)], dtype=getattr(torch, dtype))
    optimizer = ours.Adam(params, LR)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        give(generator, params)
        optimizer.step()
    twin = ours.Adam([torch.nn.Parameter(params[0].detach().clone())], LR)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (loaded,) = twin.param_groups[0]["params"]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(twin.state[loaded][name], optimizer.state[params[0]][name])
    foreign = torch.optim.Adam([torch.nn.Parameter(params[0].detach().clone())], LR)
    foreign.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.load_state_dict(foreign.state_dict())
    loaded.grad = torch.zeros_like(loaded)
    twin.step()
    rounded = optimizer.state[params[0]]["exp_avg"].to(loaded.dtype).float()
    assert torch.equal(twin.state[loaded]["exp_avg"], rounded + (0 - rounded) * torch.tensor(1 - 0.9))


def test_versions_are_raised() -> None:
    (p,) = made([(3,)])
    loss, optimizer = (p * p).sum(), ours.Adam([p])
    p.grad = torch.ones(3)
    before = p._version
    optimizer.step()
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# States.


def trained(of: Any, kind: str, steps: int, **options: Any) -> tuple[list[Any], Any]:
    params = made()
    optimizer = getattr(of, kind)([{"params": params[:3]}, {"params": params[3:], "lr": 0.02}], LR, **options)
    train(params, optimizer, range(steps))
    return params, optimizer


def train(params: list[Any], optimizer: Any, steps: range) -> None:
    for step in steps:
        give(torch.Generator().manual_seed(step), params, but={1} if step < 3 else ())
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "target"), [(torch.optim, ours), (ours, torch.optim), (ours, ours)])
def test_a_state_dict_goes_both_ways(source: Any, target: Any, kind: str, options: dict[str, Any]) -> None:
    """What goes on from it is where torch is that has never stopped. It is saved and loaded as torch does."""
    expected, _ = trained(torch.optim, kind, 20, **options)
    params, optimizer = trained(source, kind, 10, **options)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert [set(each) for each in loaded["param_groups"]] == [
        set(each) for each in trained(torch.optim, kind, 1, **options)[1].state_dict()["param_groups"]
    ]
    copied = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = getattr(target, kind)([{"params": copied[:3]}, {"params": copied[3:]}], lr=1.0)
    other.load_state_dict(loaded)
    train(copied, other, range(10, 20))
    assert steps_of(other) == [20, 17, 20, 20, 20, 20, 20]
    assert_near(expected, copied, allowed(20, torch.float32, expected, 0.02))


def test_a_state_of_torch_is_not_written_to_by_steps_here() -> None:
    """load_state_dict copies, as torch's does."""
    params, optimizer = trained(torch.optim, "Adam", 5)
    before = copy.deepcopy(optimizer.state_dict())
    other = ours.Adam([{"params": params[:3]}, {"params": params[3:]}])
    other.load_state_dict(optimizer.state_dict())
    train(params, other, range(5, 8))
    for number, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, before["state"][number][name]), name


def test_a_state_of_other_shapes_is_refused() -> None:
    _, optimizer = trained(torch.optim, "Adam", 3)
    other_params = made([(1,)] * len(SHAPES))
    other = ours.Adam([{"params": other_params[:3]}, {"params": other_params[3:]}])
    other.load_state_dict(optimizer.state_dict())
    for p in other_params:
        p.grad = torch.ones(1)
    before = [p.detach().clone() for p in other_params]
    with pytest.raises(ArgumentValueError, match=r"state\[p\]\['exp_avg'\] must have the parameter's shape \(1,\)"):
        other.step()
    assert_near(before, other_params, 0.0)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("steps", [0, 5])
def test_copies(copied_by: Callable[[Any], Any], steps: int) -> None:
    """A copy has copies of the parameters, and goes its own way."""
    params, optimizer = trained(ours, "AdamW", steps, amsgrad=True)
    twin_params, twin = copied_by((params, optimizer))
    assert type(twin) is ours.AdamW
    assert twin.param_groups[0]["params"][0] is twin_params[0]
    before = [p.detach().clone() for p in params]
    train(twin_params, twin, range(steps, steps + 5))
    assert_near(before, params, 0.0)
    train(params, optimizer, range(steps, steps + 5))
    assert_near(params, twin_params, 0.0)
    assert steps_of(twin) == steps_of(optimizer)


def test_the_state_shows_the_memory_of_the_slots() -> None:
    params, optimizer = trained(ours, "Adam", 5)
    p = params[3]
    entry = dict(optimizer.state[p])
    entry["exp_avg"].zero_()
    entry["exp_avg_sq"].zero_()
    entry["step"].zero_()
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    # The first step of Adam is the sign of its gradient.
    assert_near([before - 0.02], [p], allowed(1, torch.float32, params, 0.02))
    assert all(optimizer.state[p][name] is tensor for name, tensor in entry.items())
    assert float(entry["step"]) == 1.0
    assert float(entry["exp_avg"].max()) == pytest.approx(0.1)


@pytest.mark.parametrize("way", ["all", "a dict", "one", "exchanged", "one tensor", "one count"])
def test_a_state_that_somebody_has_put_there(way: str) -> None:
    """What people do to optimizers of torch, beside torch."""
    results = []
    for of in (torch.optim, ours):
        params, optimizer = trained(of, "Adam", 5)
        if way == "all":
            optimizer.state = defaultdict(dict)
        elif way == "a dict":
            optimizer.state = dict(optimizer.state)
        elif way == "one":
            del optimizer.state[params[3]]
        elif way == "one tensor":
            optimizer.state[params[3]]["exp_avg_sq"] = torch.full_like(params[3].detach(), 4.0)
        elif way == "one count":
            optimizer.state[params[3]]["step"] = torch.tensor(50.0)
        else:  # a parameter with more rows, and the state of the old ones
            entry = optimizer.state.pop(params[3])
            new = torch.nn.Parameter(torch.cat([params[3].detach(), torch.ones(2, 5)]))
            for name in ("exp_avg", "exp_avg_sq"):
                entry[name] = torch.cat([entry[name], torch.zeros(2, 5)])
            optimizer.state[new] = entry
            optimizer.param_groups[1]["params"][0] = params[3] = new
        train(params, optimizer, range(5, 10))
        results.append((params, steps_of(optimizer)))
    (theirs, their_steps), (mine, my_steps) = results
    assert my_steps == their_steps
    assert_near(theirs, mine, allowed(10, torch.float32, theirs, 0.02))


def test_slots_of_parameters_that_are_gone_are_freed() -> None:
    params, optimizer = trained(ours, "Adam", 3)
    count = len(optimizer._core.weights)
    del optimizer.state[params[3]]
    params[3].grad = None
    give(torch.Generator(), params, but={1, 3})
    optimizer.step()
    assert len(optimizer._core.weights) == count - 2


def test_memory_that_moves() -> None:
    """The parameter's, by `p.data = other`: the moments stay, also where they come to lie elsewhere."""
    results = []
    for of in (torch.optim, ours):
        params, optimizer = trained(of, "Adam", 5)
        for offset in (0, 1, 3):
            memory = torch.zeros(15 + offset)
            memory[offset:] = params[3].detach().reshape(-1)
            params[3].data = memory[offset:].reshape(3, 5)
            train(params, optimizer, range(5, 8))
            optimizer.state[params[3]]["exp_avg"].mul_(0.5)
        train(params, optimizer, range(8, 10))
        results.append(params)
    assert_near(results[0], results[1], allowed(16, torch.float32, results[0], 0.02))


# What torch.optim.Optimizer offers.


def test_closures() -> None:
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = ours.Adam([p], 0.5)

    def closure() -> Any:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure).detach()) == 9.0
    assert float(p.detach()) == pytest.approx(2.5)
    assert optimizer.step() is None


def test_hooks() -> None:
    p, calls = torch.nn.Parameter(torch.ones(2)), list[str]()
    optimizer = ours.Adam([p])
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append(f"pre {float(p.detach()[0]):.3f}")),
        optimizer.register_step_post_hook(lambda *_: calls.append(f"post {float(p.detach()[0]):.3f}")),
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving")),
        optimizer.register_state_dict_post_hook(lambda _, found: {**found, "more": 1}),
        optimizer.register_load_state_dict_pre_hook(lambda _, given: calls.append("loading")),
        optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded")),
    ]
    p.grad = torch.ones(2)
    optimizer.step()
    found = optimizer.state_dict()
    assert found.pop("more") == 1
    optimizer.load_state_dict(found)
    assert calls == ["pre 1.000", "post 0.999", "saving", "loading", "loaded"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 5


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool) -> None:
    (p,) = made([(3,)])
    optimizer = ours.Adam([p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=to_none)
    assert p.grad is None if to_none else not p.grad.any()
    optimizer.step()
    assert steps_of(optimizer) == [1 if to_none else 2]


def test_a_group_that_is_added() -> None:
    results = []
    for of in (torch.optim, ours):
        params = made()
        optimizer = of.AdamW(params[:3], LR)
        train(params, optimizer, range(5))
        first = optimizer.state[params[0]]["exp_avg"]
        optimizer.add_param_group({"params": params[3:], "lr": 0.02, "weight_decay": 0.5})
        train(params, optimizer, range(5, 10))
        assert optimizer.state[params[0]]["exp_avg"] is first
        assert steps_of(optimizer) == [10, 7, 10, 5, 5, 5, 5]
        results.append(params)
    assert_near(results[0], results[1], allowed(10, torch.float32, results[0], 0.02))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensors_as_numbers(shape: tuple[int, ...]) -> None:
    """A scheduler writes into a learning rate that is a tensor."""
    results = []
    for of in (torch.optim, ours):
        params, lr = made(), torch.full(shape, LR)
        optimizer = of.Adam(params, lr, betas=(torch.tensor(0.5), torch.tensor(0.75)))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            train(params, optimizer, range(step + 4, step + 5))
            schedule.step()
        assert float(lr) == pytest.approx(LR / 16)
        results.append(params)
    # The rate is a float32 there, and β are; their rounding is of the same size as the kernel's.
    assert_near(results[0], results[1], allowed(4, torch.float32, results[0]))


def test_state_may_hold_more_than_parameters() -> None:
    """Values of any kind, by other keys than parameters, and others beside a parameter's moments."""
    params = made([(3,), (4,)])
    optimizer = ours.Adam(params, LR)
    train(params, optimizer, range(3, 5))
    optimizer.state["global"] = 5
    optimizer.state[params[0]]["own"] = torch.ones(2)
    train(params, optimizer, range(5, 7))
    found = optimizer.state_dict()["state"]
    assert found["global"] == 5
    assert list(found[0]) == ["step", "exp_avg", "exp_avg_sq", "own"]
    twin = ours.Adam(params, LR)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(params, twin, range(7, 8))
    assert twin.state["global"] == 5
    assert torch.equal(twin.state[params[0]]["own"], torch.ones(2))
    assert [int(twin.state[p]["step"]) for p in params] == [5, 5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hook_may_replace_what_is_loaded(dtype: str) -> None:
    """As one that finds parameters by name: here they come in the reverse order. Hooks see all that was loaded."""
    params = made([(3,), (4,)], getattr(torch, dtype))
    first = ours.Adam(params, LR)
    train(params, first, range(3, 6))
    expected = moments_of(first)
    second, seen = ours.Adam(made([(4,), (3,)], getattr(torch, dtype)), LR), list[Any]()

    def reverse(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "params": list(reversed(group["params"]))} for group in given["param_groups"]]
        return {"state": given["state"], "param_groups": groups}

    second.register_load_state_dict_pre_hook(reverse)
    second.register_load_state_dict_post_hook(lambda optimizer: seen.extend(moments_of(optimizer)))
    second.load_state_dict(first.state_dict())
    for found in (seen, moments_of(second)):
        for x, y in zip(reversed(expected), found, strict=True):
            assert torch.equal(x, y)
            assert x.dtype == y.dtype


def moments_of(optimizer: Any) -> list[Any]:
    return [optimizer.state[p]["exp_avg"].clone() for p in optimizer.param_groups[0]["params"]]


def test_a_step_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    params = made([(3,)])
    optimizer = ours.Adam(params, capturable=True)
    train(params, optimizer, range(1))
    before = params[0].detach().clone()
    device = HostDevice()
    monkeypatch.setattr(device, "is_capturing", lambda: True)
    optimizer._devices.append(device)
    with pytest.raises(ArgumentValueError, match=r"must not be captured .* use torch\.optim\.Adam"):
        optimizer.step()
    assert torch.equal(params[0].detach(), before)
    assert steps_of(optimizer) == [1]


def test_what_makes_no_difference_is_accepted() -> None:
    results = []
    for options in ({}, {"foreach": True}, {"fused": True}, {"capturable": True}, {"foreach": False, "fused": False}):
        params = made()
        optimizer = ours.Adam(params, **options)
        train(params, optimizer, range(3))
        assert {name: optimizer.defaults[name] for name in options} == options
        results.append(params)
    for params in results[1:]:
        assert_near(results[0], params, 0.0)


def test_named_parameters_and_the_text() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = ours.AdamW(model.named_parameters(), lr=0.5)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert repr(optimizer).startswith("AdamW (\nParameter Group 0\n    amsgrad: False\n")
    assert "lr: 0.5\n" in repr(optimizer)
    assert optimizer.defaults["weight_decay"] == 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_and_the_defaults_are_torchs(kind: str) -> None:
    one, other = (getattr(of, kind)(made(), maximize=True) for of in (torch.optim, ours))
    assert (repr(one), one.defaults, list(one.param_groups[0])) == (
        repr(other),
        other.defaults,
        [*other.param_groups[0]],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1e-3}, r"lr must be >= 0 \(got -0.001\)"),
        ({"lr": float("nan")}, r"lr must be finite \(got nan\)"),
        ({"lr": torch.ones(2)}, r"lr must have one element \(got shape \(2,\)\)"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must lie in \[0, 1\) \(got 1.0\)"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must lie in \[0, 1\) \(got -0.1\)"),
        ({"betas": (torch.tensor(0.9), torch.tensor(1.5))}, r"betas\[1\] must lie in \[0, 1\) \(got 1.5\)"),
        ({"eps": -1e-8}, r"eps must be >= 0 \(got -1e-08\)"),
        ({"weight_decay": -0.1}, r"weight_decay must be finite and >= 0 \(got -0.1\)"),
        ({"differentiable": True}, r"differentiable must be False, .* \(got True\); use torch.optim.Adam"),
    ],
)
def test_numbers_that_are_refused(kind: str, arguments: dict[str, Any], message: str) -> None:
    """Where torch refuses them too, with a ValueError."""
    if "differentiable" not in arguments and not np.isnan(float(torch.as_tensor(arguments.get("lr", 1)).sum())):
        with pytest.raises(ValueError):  # noqa: PT011  (torch's text is torch's)
            getattr(torch.optim, kind)(made(), **arguments)
    with pytest.raises(ArgumentValueError, match=message):
        getattr(ours, kind)(made(), **arguments)


@pytest.mark.parametrize(
    "arguments", [{"lr": "0.1"}, {"betas": 0.9}, {"betas": (0.9,)}, {"eps": None}, {"amsgrad": 2}], ids=str
)
def test_what_is_no_number(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentTypeError):
        ours.Adam(made(), **arguments)


@pytest.mark.parametrize("params", [[], torch.ones(2), [3.0], [torch.ones(2, requires_grad=True) * 2]], ids=str)
def test_parameters_that_torch_refuses(params: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        torch.optim.Adam(params)
    with pytest.raises(theirs.type) as mine:
        ours.Adam(params)
    assert str(mine.value) == str(theirs.value)


def test_a_group_whose_number_breaks_its_rule_later_changes_nothing() -> None:
    params, optimizer = trained(ours, "Adam", 3)
    optimizer.param_groups[1]["betas"] = (0.9, 1.0)
    give(torch.Generator(), params)
    before, entries = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ArgumentValueError, match=r"betas\[1\] must lie in \[0, 1\)"):
        optimizer.step()
    assert_near(before, params, 0.0)
    for number, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, entries[number][name]) for name, value in entry.items())


# Gradients of other kinds.


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients_have_the_bits_of_dense_ones(kind: str) -> None:
    embeddings = [torch.nn.Embedding(10, 4, sparse=sparse) for sparse in (True, False)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    optimizers = [getattr(ours, kind)(each.parameters(), LR) for each in embeddings]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        rows = torch.randint(10, (6,), generator=generator)
        for embedding, optimizer in zip(embeddings, optimizers, strict=True):
            optimizer.zero_grad()
            (embedding(rows) ** 3).sum().backward()
            optimizer.step()
    assert embeddings[0].weight.grad.is_sparse
    assert torch.equal(embeddings[0].weight.detach(), embeddings[1].weight.detach())
    assert steps_of(optimizers[0]) == [10]


@pytest.mark.parametrize("dims", [1, 2])
def test_coordinates_that_come_twice_or_name_elements(dims: int) -> None:
    sparse, dense = made([(3, 5)]), made([(3, 5)])
    indices = torch.tensor([[2, 0, 2, 1], [1, 0, 1, 4]])[:dims]
    values = torch.ones(4, 5) if dims == 1 else torch.ones(4)
    gradient = torch.sparse_coo_tensor(indices, values, (3, 5), check_invariants=True)
    sparse[0].grad, dense[0].grad = gradient, gradient.to_dense()
    for params in (sparse, dense):
        optimizer = ours.Adam(params)
        for _ in range(3):
            optimizer.step()
    assert torch.equal(sparse[0].detach(), dense[0].detach())


def test_gradients_that_are_not_contiguous_or_part_of_a_graph() -> None:
    one, other = made([(4, 4)]), made([(4, 4)])
    gradient = torch.arange(16.0).reshape(4, 4)
    one[0].grad, other[0].grad = gradient.T, gradient.T.contiguous()
    other[0].grad.requires_grad_()
    for params in (one, other):
        ours.Adam(params).step()
    assert torch.equal(one[0].detach(), other[0].detach())


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_gradients_of_gradients() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = ours.Adam([p], 0.5)
    (p**3).sum().backward(create_graph=True)
    assert p.grad.requires_grad
    optimizer.step()
    assert float(p.detach()) == pytest.approx(1.5)
    p.grad = None


# Around it.


def test_scaled_gradients() -> None:
    """GradScaler unscales them, and leaves out the step where one is infinite."""
    results = []
    for of in (torch.optim, ours):
        params = made([(3,), (4,)])
        optimizer, scaler = of.AdamW(params, LR), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(6):
            optimizer.zero_grad()
            loss = sum((p * p).sum() for p in params) * (float("inf") if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert steps_of(optimizer) == [5, 5]
        assert scaler.get_scale() == 512.0
        results.append(params)
    # Here a gradient is twice its parameter: an error is handed on to the next gradient, whose size divides out.
    assert_near(results[0], results[1], 2 * allowed(6, torch.float32, results[0]))


def test_a_compiled_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    plain = copy.deepcopy(model)
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(8, 3)
    for module in (compiled, plain):
        optimizer = ours.Adam(module.parameters(), LR)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        assert steps_of(optimizer) == [3] * 4
    assert_near(list(plain.parameters()), list(model.parameters()), 1e-5)


def test_a_step_in_a_compiled_function() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ours.Adam([p], 0.5)
    p.grad = torch.ones(3)
    torch.compile(optimizer.step, backend="eager")()
    assert float(p.detach()[0]) == pytest.approx(0.5)


DISTRIBUTED = """
import sys, torch, gpu_adam.torch
from torch.nn.parallel import DistributedDataParallel
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bool(int(sys.argv[3])))
optimizer = gpu_adam.torch.AdamW(wrapped.parameters(), lr=0.01)
x = torch.arange(24.0).reshape(8, 3) / 24
for _ in range(5):
    optimizer.zero_grad()
    wrapped(x[rank::2]).square().mean().backward()
    optimizer.step()
print(model.weight.detach().double().numpy().tobytes().hex(), flush=True)
torch.distributed.barrier()  # neither process leaves while the other one talks to it
del wrapped
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("buckets", [0, 1])
def test_distributed(tmp_path: Any, buckets: int) -> None:
    """Two processes with half of the data each stay together, and where one with all data is."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    command = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(buckets)], stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert outputs[0] == outputs[1] != b""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer, x = torch.optim.AdamW(model.parameters(), lr=0.01), torch.arange(24.0).reshape(8, 3) / 24
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    found = np.frombuffer(bytes.fromhex(outputs[0].decode().strip())).reshape(1, 3)
    # The mean over data is summed in another order: an error of each gradient, of which Adam's step keeps the size.
    np.testing.assert_allclose(found, model.weight.detach().numpy(), atol=5 * 0.01 * 1e-4)


def test_steps_are_enqueued_on_the_stream_of_torch(device: Device) -> None:
    """Of a torch with CUDA, which stands in here; on the host there is nothing to follow."""
    if isinstance(device, HostDevice):
        with device.on_stream_of(None):
            return
    cupy = device.xp
    stream, before = cupy.cuda.Stream(), cupy.cuda.get_current_stream().ptr
    current = {0: SimpleNamespace(cuda_stream=stream.ptr)}
    with device.on_stream_of(SimpleNamespace(cuda=SimpleNamespace(current_stream=current.__getitem__))):
        assert cupy.cuda.get_current_stream().ptr == stream.ptr
    assert cupy.cuda.get_current_stream().ptr == before


def test_the_package_does_without_torch() -> None:
    code = "import sys, gpu_adam; assert 'torch' not in sys.modules; gpu_adam.torch.Adam; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert gpu_adam.torch is ours
