"""Losses computed by PyTorch, differentiated by PyTorch, on the memory of the variables.

    from gpu_adam.autodiff.torch import view

    optimizer.minimize(lambda: torch.mean((x @ view(w) - y) ** 2), [w])

Nothing is copied: a view shares the variable's memory through DLPack, on the CPU and on CUDA devices, and so does a
gradient that PyTorch hands back.  PyTorch's gradients of complex tensors point uphill, as here.
"""

from typing import Any

import numpy as np
import torch

from gpu_adam.arrays import namespace
from gpu_adam.autodiff.cotangent import check_kind, check_shape
from gpu_adam.autodiff.node import Node
from gpu_adam.autodiff.rules import plain
from gpu_adam.autodiff.sparse_cotangent import SparseCotangent
from gpu_adam.autodiff.tape import Tape
from gpu_adam.autodiff_seam import current_tracer
from gpu_adam.variables import Variable


def view(variable: Variable) -> torch.Tensor:
    """A tensor over the memory of a variable.

    Inside a loss that is being differentiated, a leaf that requires its gradient, the same one at every call.  It must
    not be written to, and must not be kept: the next step changes its contents.
    """
    tape, array = current_tracer.get(), variable._value
    if not isinstance(tape, Tape) or type(tape.operand(variable, array)) is not Node:
        return tensor(array)
    views = tape.views.setdefault("torch", {})
    if id(variable) not in views:
        views[id(variable)] = tensor(array).requires_grad_()
    return views[id(variable)]


def pull_back(tape: Tape, losses: list[Any], seeds: list[Any]) -> list[Any]:
    """Add the gradients of PyTorch losses to the leaves of the tape; the losses' values."""
    outputs, cotangents = [], []
    for loss, seed in zip(losses, seeds, strict=True):
        kind = "c" if loss.is_complex() else "f" if loss.is_floating_point() else "i"
        check_kind(kind, f"a tensor of dtype {loss.dtype}", seed)
        if loss.requires_grad:
            outputs.append(loss)
            cotangents.append(_cotangent(loss, seed))
    views = tape.views.get("torch", {})
    keys, tensors = list(views), list(views.values())
    if outputs and tensors:
        gradients = torch.autograd.grad(outputs, tensors, cotangents, allow_unused=True)
        for key, gradient in zip(keys, gradients, strict=True):
            if gradient is not None:
                leaf = tape.leaves[key]
                contribution = _gradient(gradient, leaf.array)
                leaf.gradient = contribution if leaf.gradient is None else leaf.gradient + contribution
    return [loss.detach() for loss in losses]


def _cotangent(loss: torch.Tensor, seed: Any) -> torch.Tensor:
    if seed is None:
        return torch.ones_like(loss)
    seed = plain(seed)
    check_shape(tuple(getattr(seed, "shape", np.shape(seed))), tuple(loss.shape))
    return torch.ones_like(loss) * torch.as_tensor(seed, dtype=loss.dtype, device=loss.device)


def tensor(array: Any) -> torch.Tensor:
    """A tensor over the memory of an array, in its dtype."""
    if array.dtype.name == "bfloat16":  # which DLPack and NumPy do not know of each other
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def _gradient(gradient: torch.Tensor, like: Any) -> Any:
    if gradient.is_sparse and gradient.sparse_dim() == 1:
        indices, values = gradient._indices()[0], gradient._values()
        return SparseCotangent(like, _array(indices, like), _array(values, like), rows=True)
    return _array(gradient if gradient.layout is torch.strided else gradient.to_dense(), like)


def _array(tensor: torch.Tensor, like: Any) -> Any:
    from_dlpack = namespace(like).from_dlpack
    tensor = tensor.resolve_conj().resolve_neg().contiguous()  # which DLPack does not know of
    if tensor.dtype == torch.bfloat16:
        return from_dlpack(tensor.view(torch.int16)).view(like.dtype)
    return from_dlpack(tensor)
