"""Keras 3 on TensorFlow, and the reference itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_adam.bench.clocks import Candidate, Step, WallClock
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.peers.base import EPSILON, RATE, Unsupported, only
from gpu_adam.bench.workloads import CLIP_NORM
from gpu_adam.devices import Device

# Beyond, tracing the function takes minutes and gigabytes.
_MOST_VARIABLES = 200


def keras(sets: Sequence[Inputs], device: Device) -> Candidate:
    """``keras.optimizers.Adam`` on TensorFlow, in a ``tf.function``."""
    import tensorflow  # noqa: PLC0415

    return _tensorflow("keras on tensorflow", tensorflow.keras.optimizers.Adam, sets, device)


def tf_keras(sets: Sequence[Inputs], device: Device) -> Candidate:
    """``tf.keras.optimizers.legacy.Adam`` of the package tf-keras: the reference itself, in a ``tf.function``."""
    import tf_keras  # noqa: PLC0415

    return _tensorflow("tf.keras legacy", tf_keras.optimizers.legacy.Adam, sets, device)


def _tensorflow(name: str, adam: Any, sets: Sequence[Inputs], device: Device) -> Candidate:
    import tensorflow as tf  # noqa: PLC0415

    workload = sets[0].workload
    only(workload, sparse=bool(workload.indices), amsgrad=True, clip=True)
    if len(sets[0].shapes) > _MOST_VARIABLES:
        raise Unsupported
    gpus = tf.config.list_physical_devices("GPU")
    if device.name != "host" and not gpus:
        raise Unsupported
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    place = "/CPU:0" if device.name == "host" else f"/GPU:{getattr(device, 'index', 0)}"

    def step_of(inputs: Inputs) -> Step:
        count = range(len(inputs.shapes))
        with tf.device(place):
            variables = [tf.Variable(inputs.theta(k)) for k in count]
            if workload.indices:
                parts = [(tf.constant(inputs.values(k)), tf.constant(inputs.indices(k))) for k in count]
                gradients = [tf.IndexedSlices(*part, inputs.shapes[k]) for k, part in enumerate(parts)]
            else:
                gradients = [tf.constant(inputs.gradient(k)) for k in count]
            clip = {"global_clipnorm": CLIP_NORM} if workload.clip else {}
            optimizer = adam(RATE, epsilon=EPSILON, amsgrad=workload.amsgrad, **clip)
            if hasattr(optimizer, "build"):
                optimizer.build(variables)

        @tf.function(autograph=False)  # type: ignore[untyped-decorator,unused-ignore]
        def step() -> None:
            with tf.device(place):
                optimizer.apply_gradients(zip(gradients, variables, strict=True))

        return step  # type: ignore[no-any-return]

    wait = (lambda: None) if device.name == "host" else tf.test.experimental.sync_devices
    return Candidate(name, [step_of(inputs) for inputs in sets], WallClock(wait))
