"""PyTorch's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_adam.bench.clocks import Candidate, Step, WallClock
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.peers.base import EPSILON, RATE, Unsupported, only
from gpu_adam.bench.workloads import CLIP_NORM
from gpu_adam.devices import Device


def torch_fused(sets: Sequence[Inputs], device: Device) -> Candidate:
    """``torch.optim.Adam(fused=True)``; moments of 16-bit parameters have 16 bits there."""
    only(sets[0].workload, amsgrad=True, clip=True, halves=True)
    return _torch("torch fused", sets, device, fused=True)


def own_in_torch(sets: Sequence[Inputs], device: Device) -> Candidate:
    """``gpu_adam.torch.Adam``: our kernels, and what an optimizer of torch does in Python beside them."""
    from gpu_adam.torch import Adam  # noqa: PLC0415

    if sets[0].workload.dtype.startswith("complex") and sets[0].workload.complex_mode != "real_imag":
        raise Unsupported
    only(sets[0].workload, amsgrad=True, clip=True, real=False)
    return _torch("gpu_adam.torch", sets, device, kind=Adam)


def torch_foreach(sets: Sequence[Inputs], device: Device) -> Candidate:
    """``torch.optim.Adam(foreach=True)``, which sees complex variables as pairs of real ones; moments as in fused."""
    if sets[0].workload.dtype.startswith("complex") and sets[0].workload.complex_mode != "real_imag":
        raise Unsupported
    only(sets[0].workload, amsgrad=True, clip=True, real=False)
    return _torch("torch foreach", sets, device, foreach=True)


def torch_graph(sets: Sequence[Inputs], device: Device) -> Candidate:
    """``torch.optim.Adam(fused=True, capturable=True)``, replayed from a CUDA graph."""
    import torch  # noqa: PLC0415

    if device.name == "host":
        raise Unsupported
    only(sets[0].workload, amsgrad=True)
    eager = _torch("", sets, device, fused=True, capturable=True)
    replays = []
    for step in eager.steps:
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replays.append(graph.replay)
    return Candidate("torch fused, graph", [*replays], _TorchEvents())


def torch_dense_equivalent(sets: Sequence[Inputs], device: Device) -> Candidate:
    """The sparse gradient written out, then ``torch.optim.Adam(fused=True)``: what our sparse update computes."""
    only(sets[0].workload, sparse=True, amsgrad=True)
    return _torch("torch, written out dense", sets, device, fused=True)


def torch_sparse(sets: Sequence[Inputs], device: Device) -> Candidate:
    """``torch.optim.SparseAdam``: lazy, so rows without gradient do not move; another result for less work."""
    import torch  # noqa: PLC0415

    only(sets[0].workload, sparse=True)
    steps: list[Step] = []
    for inputs in sets:
        parameters = _torch_parameters(inputs, device)
        for k, parameter in enumerate(parameters):
            indices, values = (_tensor(array, device) for array in (inputs.indices(k), inputs.values(k)))
            parameter.grad = torch.sparse_coo_tensor(indices[None], values, parameter.shape, check_invariants=False)
        steps.append(torch.optim.SparseAdam(parameters, lr=RATE, eps=EPSILON).step)
    return Candidate("torch SparseAdam (lazy)", steps, _torch_clock(device))


def _torch(name: str, sets: Sequence[Inputs], device: Device, kind: Any = None, **options: Any) -> Candidate:
    import torch  # noqa: PLC0415

    kind = torch.optim.Adam if kind is None else kind

    workload = sets[0].workload

    def step_of(inputs: Inputs) -> Step:
        parameters = _torch_parameters(inputs, device)
        slices = []
        for k, parameter in enumerate(parameters):
            if workload.indices:
                parameter.grad = torch.zeros_like(parameter)
                slices.append((parameter.grad, _tensor(inputs.indices(k), device), _tensor(inputs.values(k), device)))
            else:
                parameter.grad = _tensor(inputs.gradient(k), device)
        optimizer = kind(parameters, lr=RATE, eps=EPSILON, amsgrad=workload.amsgrad, **options)

        def step() -> None:
            for gradient, indices, values in slices:
                gradient.zero_().index_add_(0, indices, values)
            if workload.clip:
                torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()

        return step

    return Candidate(name, [step_of(inputs) for inputs in sets], _torch_clock(device))


def _torch_parameters(inputs: Inputs, device: Device) -> list[Any]:
    return [_tensor(inputs.theta(k), device).requires_grad_() for k in range(len(inputs.shapes))]


def _tensor(array: np.ndarray, device: Device) -> Any:
    import torch  # noqa: PLC0415

    from gpu_adam.autodiff.torch import tensor  # noqa: PLC0415

    if device.name == "host":
        torch.set_num_threads(getattr(device, "threads", torch.get_num_threads()))
        return tensor(array).clone()
    return tensor(array).to(device.name)


def _torch_clock(device: Device) -> Any:
    return WallClock(lambda: None) if device.name == "host" else _TorchEvents()


class _TorchEvents:
    """CUDA events in torch's current stream."""

    def __call__(self, run: Callable[[], None]) -> float:
        import torch  # noqa: PLC0415

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3
