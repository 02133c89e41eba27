"""Losses computed by PyTorch."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu_adam import ArgumentValueError, IndexedSlices, Variable
from gpu_adam.autodiff import gradients, value_and_grad

torch = pytest.importorskip("torch")

from gpu_adam.autodiff.torch import view  # noqa: E402  # needs torch


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64, np.complex128])
def test_gradients_of_each_type(dtype: type) -> None:
    w = Variable(np.array([3, 4], dtype))
    value, gradient = value_and_grad(lambda: torch.sum(torch.abs(view(w)) ** 2), w)
    assert float(value) == 25
    assert gradient.dtype == dtype
    assert gradient.tolist() == [6, 8]


def test_bfloat16() -> None:
    w = Variable(np.array([3, 4], ml_dtypes.bfloat16))
    _, gradient = value_and_grad(lambda: torch.sum(view(w) ** 2), w)
    assert gradient.dtype == ml_dtypes.bfloat16
    assert gradient.tolist() == [6, 8]


def test_memory_is_shared() -> None:
    w = Variable(np.ones(3))
    assert view(w).data_ptr() == w.value.ctypes.data
    assert not view(w).requires_grad
    addresses: list[int] = []

    def loss() -> Any:
        addresses.append(view(w).data_ptr())
        return torch.sum(view(w))

    value_and_grad(loss, w)
    assert addresses == [w.value.ctypes.data]


def test_unused_and_unwatched_variables() -> None:
    w, b, other = Variable(np.ones(2)), Variable(np.ones(2)), Variable(np.ones(2))
    _, found = value_and_grad(lambda: torch.sum(view(w) * view(other)) + 0 * torch.sum(view(b)).detach(), [w, b])
    assert found[0].tolist() == [1, 1]
    assert found[1] is None
    assert value_and_grad(lambda: torch.tensor(1.0), w)[1] is None


def test_mixed_with_numpy_losses() -> None:
    w = Variable(np.ones(2))
    values, gradient = value_and_grad(lambda: [torch.sum(view(w) * 2), np.sum(w * 3), torch.sum(view(w))], w)
    assert gradient.tolist() == [6, 6]
    assert [float(v) for v in values] == [4, 6, 2]


def test_embedding_stays_sparse() -> None:
    w = Variable(np.ones((100, 2)))
    rows = torch.tensor([5, 5, 7])
    _, gradient = value_and_grad(lambda: torch.sum(torch.nn.functional.embedding(rows, view(w), sparse=True)), w)
    assert isinstance(gradient, IndexedSlices)
    assert sorted(gradient.indices.tolist()) == [5, 5, 7]


@pytest.mark.parametrize("cotangent", [2.0, np.array([2.0, 2.0]), torch.tensor([2.0, 2.0])])
def test_cotangents(cotangent: Any) -> None:
    w = Variable(np.ones(2))
    _, pairs = gradients(lambda: view(w) * 3, w, cotangent)
    assert pairs[0][0].tolist() == [6, 6]


def test_bad_losses() -> None:
    w = Variable(np.ones(2))
    with pytest.raises(ArgumentValueError, match="no gradients provided"):
        value_and_grad(lambda: torch.tensor(3), w)
    with pytest.raises(ArgumentValueError, match="absolute value"):
        value_and_grad(lambda: torch.sum(view(w)) * 1j, w)
    with pytest.raises(ArgumentValueError, match="shape of the loss"):
        gradients(lambda: view(w) * 3, w, np.ones(3))


def test_gradient_is_not_copied() -> None:
    w = Variable(np.ones(3))
    tensors: list[Any] = []

    def loss() -> Any:
        tensor = view(w)
        tensor.register_hook(tensors.append)
        return torch.sum(tensor**2)

    _, gradient = value_and_grad(loss, w)
    assert gradient.ctypes.data == tensors[0].data_ptr()


def test_gradients_of_other_layouts() -> None:
    """Sparse in all axes, as of a gather, or with elements still to be negated."""
    w, index = Variable(np.ones((3, 2))), torch.tensor([[0, 1], [0, 0]])
    _, gradient = value_and_grad(lambda: torch.sum(torch.gather(view(w), 0, index, sparse_grad=True)), w)
    assert gradient.tolist() == [[2, 1], [0, 1], [0, 0]]

    class Negated(torch.autograd.Function):  # type: ignore[name-defined, misc]
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return torch._neg_view(torch.full((3, 2), -2.0, dtype=torch.float64))

    _, gradient = value_and_grad(lambda: Negated.apply(view(w)), w)
    assert gradient.tolist() == [[2, 2]] * 3
