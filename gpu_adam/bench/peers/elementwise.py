"""Who launches a kernel for each variable: CuPy by hand, Warp, thinc."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_adam.bench.clocks import Candidate, Step, WallClock
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.own_step import stream_clock
from gpu_adam.bench.peers.base import EPSILON, RATE, Unsupported, only
from gpu_adam.devices import Device


def cupy_elementwise(sets: Sequence[Inputs], device: Device) -> Candidate:
    """A ``cupy.ElementwiseKernel`` for each variable: what CuPy programs do by themselves."""
    if device.name == "host":
        raise Unsupported
    only(sets[0].workload)
    kernel = device.xp.ElementwiseKernel(
        "T g, T alpha, T c1, T c2, T epsilon",
        "T theta, T m, T v",
        "m += (g - m) * c1; v += (g * g - v) * c2; theta -= alpha * m / (sqrt(v) + epsilon);",
        "plain_adam",
    )

    def step_of(inputs: Inputs) -> Step:
        count = range(len(inputs.shapes))
        arrays = [[device.array(inputs.gradient(k)), device.array(inputs.theta(k))] for k in count]
        for pair in arrays:
            pair += [device.xp.zeros_like(pair[0]), device.xp.zeros_like(pair[0])]

        def step() -> None:
            for g, theta, m, v in arrays:
                kernel(g, RATE, 0.1, 0.001, EPSILON, theta, m, v)

        return step

    return Candidate("cupy ElementwiseKernel", [step_of(inputs) for inputs in sets], stream_clock(device))


def warp(sets: Sequence[Inputs], device: Device) -> Candidate:
    """``warp.optim.Adam``."""
    import warp as wp  # noqa: PLC0415
    import warp.optim  # noqa: PLC0415

    only(sets[0].workload)
    if sets[0].workload.dtype != "float32":
        raise Unsupported
    wp.config.quiet = True
    place = "cpu" if device.name == "host" else device.name

    def step_of(inputs: Inputs) -> Step:
        count = range(len(inputs.shapes))
        parameters, gradients = (
            [wp.array(make(k).reshape(-1), dtype=wp.float32, device=place) for k in count]
            for make in (inputs.theta, inputs.gradient)
        )
        optimizer = warp.optim.Adam(parameters, lr=RATE, eps=EPSILON)
        return lambda: optimizer.step(gradients)

    return Candidate("warp", [step_of(inputs) for inputs in sets], WallClock(lambda: wp.synchronize_device(place)))


def thinc(sets: Sequence[Inputs], device: Device) -> Candidate:
    """``thinc.api.Adam`` of spaCy, without averages; its step also zeroes the gradient."""
    from thinc.api import Adam  # noqa: PLC0415

    only(sets[0].workload)
    if sets[0].workload.dtype != "float32":
        raise Unsupported

    def step_of(inputs: Inputs) -> Step:
        pairs = [(device.array(inputs.theta(k)), device.array(inputs.gradient(k))) for k in range(len(inputs.shapes))]
        optimizer = Adam(RATE, eps=EPSILON, L2=0.0, grad_clip=0.0, use_averages=False)

        def step() -> None:
            for k, (theta, gradient) in enumerate(pairs):
                optimizer((k, "theta"), theta, gradient)

        return step

    return Candidate("thinc", [step_of(inputs) for inputs in sets], WallClock(device.synchronize))
