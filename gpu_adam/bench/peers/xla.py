"""Optax, compiled by JAX."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from gpu_adam.bench.clocks import Candidate, Step, WallClock
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.peers.base import EPSILON, RATE, Unsupported, only
from gpu_adam.bench.workloads import CLIP_NORM
from gpu_adam.devices import Device

# Beyond, compiling takes minutes.
_MOST_VARIABLES = 1000


def optax(sets: Sequence[Inputs], device: Device) -> Candidate:
    """``optax.adam``, jitted with donated buffers; a sparse gradient is written out inside."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes three quarters of a GPU's memory
    import jax  # noqa: PLC0415
    import optax  # noqa: PLC0415

    workload = sets[0].workload
    only(workload, sparse=bool(workload.indices), amsgrad=True, clip=True, real=False)
    if workload.complex_mode != "abs2" or len(sets[0].shapes) > _MOST_VARIABLES:
        raise Unsupported
    jax.config.update("jax_enable_x64", True)
    place = _jax_device(jax, device)
    adam = (optax.amsgrad if workload.amsgrad else optax.adam)(RATE, eps=EPSILON)
    chain = optax.chain(optax.clip_by_global_norm(CLIP_NORM), adam) if workload.clip else adam

    def update(parameters: Any, state: Any, gradients: Any) -> Any:
        if workload.indices:
            pairs = zip(parameters, gradients, strict=True)
            gradients = [jax.numpy.zeros_like(p).at[indices].add(values) for p, (indices, values) in pairs]
        updates, state = chain.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step_of(inputs: Inputs) -> Step:
        count = range(len(inputs.shapes))
        parameters = jax.device_put([inputs.theta(k) for k in count], place)
        if workload.indices:
            gradients = jax.device_put([(inputs.indices(k), inputs.values(k)) for k in count], place)
        else:
            gradients = jax.device_put([inputs.gradient(k) for k in count], place)
        held = [parameters, chain.init(parameters)]

        def step() -> None:
            held[:] = jitted(*held, gradients)
            if device.name == "host":
                held[0][-1].block_until_ready()  # one program: all its results are ready together

        step.held = held  # type: ignore[attr-defined]
        return step

    steps = [step_of(inputs) for inputs in sets]
    return Candidate("optax", steps, WallClock(lambda: [step.held[0][-1].block_until_ready() for step in steps]))  # type: ignore[attr-defined]


def _jax_device(jax: Any, device: Device) -> Any:
    try:
        return jax.devices("cpu")[0] if device.name == "host" else jax.devices("cuda")[getattr(device, "index", 0)]
    except RuntimeError as error:
        raise Unsupported from error
