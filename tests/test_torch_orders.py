"""gpu_adam.torch: parameters that lie in memory in another order than that of their elements."""

import copy
from typing import Any

import pytest

from gpu_adam.errors import ArgumentValueError

torch: Any = pytest.importorskip("torch", reason="torch is not installed (extra: torch)")
ours: Any = pytest.importorskip("gpu_adam.torch")

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DTYPES = ["float32", "float64", "bfloat16", "complex64"]


def laid_out() -> list[Any]:
    """Tensors without gaps: channels_last in two and three dimensions, transposes, sizes of one, and ordinary ones."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=rng)

    return [
        normal(4, 3, 2, 5).to(memory_format=torch.channels_last),
        normal(2, 3, 2, 2, 3).to(memory_format=torch.channels_last_3d),
        normal(5, 7).t(),
        normal(2, 3, 4).permute(1, 2, 0),
        normal(6, 3, 1, 1).to(memory_format=torch.channels_last),  # which is contiguous too
        normal(40, 5)[10:30].t(),
        normal(3, 4),
        normal(0, 3).t(),
    ]


def parameters(dtype: Any, *, contiguous: bool = False) -> list[Any]:
    tensors = [x.to(dtype) for x in laid_out()]
    return [torch.nn.Parameter(x.contiguous() if contiguous else x) for x in tensors]


def give(params: list[Any], seed: int, *, like_parameters: bool) -> None:
    """Random gradients: laid out as the parameters, or contiguous."""
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        gradient = torch.randn(p.shape, dtype=p.dtype, generator=rng)
        p.grad = torch.empty_like(p).copy_(gradient) if like_parameters else gradient


def assert_equal(one: list[Any], other: list[Any]) -> None:
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x.detach(), y.detach())


@pytest.mark.parametrize("like_parameters", [True, False], ids=["gradients alike", "contiguous gradients"])
@pytest.mark.parametrize("name", DTYPES)
def test_bits_do_not_depend_on_the_order_in_memory(name: str, like_parameters: bool) -> None:
    """The parameters keep it, and moments have it."""
    dtype = getattr(torch, name)
    params, contiguous = parameters(dtype), parameters(dtype, contiguous=True)
    strides = [p.stride() for p in params]
    one, other = (ours.AdamW(each, 0.1, amsgrad=True) for each in (params, contiguous))
    for step in range(3):
        give(params, step, like_parameters=like_parameters)
        give(contiguous, step, like_parameters=False)
        one.step()
        other.step()
    assert_equal(params, contiguous)
    assert [p.stride() for p in params] == strides
    for p, q in zip(params, contiguous, strict=True):
        for slot in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            moment = one.state[p][slot]
            assert torch.equal(moment, other.state[q][slot])
            assert moment.stride() == torch.zeros_like(p, memory_format=torch.preserve_format).stride()


def test_gradients_of_an_order_of_their_own_and_sparse_ones() -> None:
    params, contiguous = ([torch.nn.Parameter(torch.ones(4, 6).t() if k else torch.ones(6, 4))] for k in (1, 0))
    gradients = [
        torch.arange(24.0).reshape(2, 6, 2).permute(1, 0, 2).reshape(6, 4),
        torch.ones(1, 4).expand(6, 4),
        torch.sparse_coo_tensor([[1, 5, 1]], torch.ones(3, 4), (6, 4), check_invariants=True),
    ]
    for each in (params, contiguous):
        optimizer = ours.Adam(each)
        for gradient in gradients:
            each[0].grad = gradient
            optimizer.step()
    assert_equal(params, contiguous)


def test_a_model_that_is_reordered_between_steps() -> None:
    """As by `module.to(memory_format=)`, which exchanges `data`: contiguous, channels_last, and back."""
    results = []
    for formats in ([torch.contiguous_format] * 3, [torch.contiguous_format, torch.channels_last] * 2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Conv2d(4, 2, 2))
        optimizer = ours.Adam(model.parameters(), 0.1)
        x = torch.randn(2, 3, 5, 5)
        for memory_format in formats[:3]:
            model.to(memory_format=memory_format)
            for p in model.parameters():
                p.grad = p.detach() * 0.5
            optimizer.step()
        assert model(x).shape == (2, 2, 3, 3)
        assert {int(entry["step"]) for entry in optimizer.state.values()} == {3}
        results.append(list(model.parameters()))
    assert_equal(*results)


def test_other_memory_of_the_same_order() -> None:
    params, contiguous = ([torch.nn.Parameter(torch.ones(3, 5).t().contiguous().t())] for _ in range(2))
    for each in (params, contiguous):
        p = each[0]
        optimizer = ours.Adam(each, 0.1)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
            if each is params:
                p.data = p.data.clone()
    assert_equal(params, contiguous)


@pytest.mark.parametrize("source", ["torch", "gpu_adam"])
def test_states_go_both_ways(source: str) -> None:
    params = parameters(torch.float32)
    first = (torch.optim if source == "torch" else ours).Adam(params, 0.1)
    give(params, 0, like_parameters=True)
    first.step()
    others = [[torch.nn.Parameter(p.detach().clone()) for p in params] for _ in range(2)]
    for of, each in zip((torch.optim, ours), others, strict=True):
        optimizer = of.Adam(each, 0.1)
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
        give(each, 1, like_parameters=True)
        optimizer.step()
        for p, q in zip(params, each, strict=True):
            assert optimizer.state[q]["exp_avg"].stride() == first.state[p]["exp_avg"].stride()
    for x, y in zip(*others, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_autograd_sees_the_step() -> None:
    p = torch.nn.Parameter(torch.ones(3, 4).t())
    before = p._version
    loss = (p * p).sum()
    p.grad = torch.ones(4, 3)
    ours.Adam([p]).step()
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(4, 6)[:, ::2], torch.ones(1, 3).expand(4, 3), torch.ones(10).as_strided((4, 3), (2, 1))],
    ids=["gaps", "expanded", "overlap"],
)
def test_gaps_and_overlaps_are_refused(tensor: Any) -> None:
    p, q = torch.nn.Parameter(tensor), torch.nn.Parameter(torch.ones(2, 3).t())
    p.grad, q.grad = torch.ones(tensor.shape), torch.ones(3, 2)
    optimizer = ours.Adam([q, p])
    with pytest.raises(ArgumentValueError, match=r"must be C-contiguous \(got strides .*pass a contiguous array"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(q.detach(), torch.ones(3, 2))


def test_parameters_that_have_no_shape_yet() -> None:
    """A step before the first call of a lazy module leaves its parameters alone, as torch's does."""
    model = torch.nn.LazyConv2d(2, 3)
    optimizer = ours.Adam(model.parameters(), 0.1)
    optimizer.step()
    model(torch.ones(1, 3, 4, 4))
    model.to(memory_format=torch.channels_last)
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones(2, 3, 3, 3)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1)
