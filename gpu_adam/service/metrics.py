"""What Prometheus scrapes of a service, in base units.

The labels `gpu` and `UUID` are those of dcgm-exporter, so that its figures of the GPU can be joined; empty on the host.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from gpu_adam.service.served import ServedOptimizer
from gpu_adam.service.server import Server

_LABELS = ("optimizer", "gpu", "UUID")
_BUCKETS = tuple(factor * 10.0**power for power in range(-5, 1) for factor in (1, 2, 5))


class Metrics:
    """The figures of a service's optimizers. Its methods are called in the server's thread.

    Args:
        server: has the optimizers.
        gpu, uuid: the device, as NVML has it; "" for the host.
    """

    def __init__(self, server: Server, gpu: str, uuid: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._server, self._device = server, (gpu, uuid)
        self._registry = registry = CollectorRegistry()

        text = "Steps made since the service was started."
        self._steps = Counter("gpu_adam_steps_total", text, _LABELS, registry=registry)
        name, text = "gpu_adam_step_duration_seconds", "What a step took the host; on CUDA, to enqueue it."
        self._seconds = Histogram(name, text, _LABELS, buckets=_BUCKETS, registry=registry)
        text = "Steps whose gradients were not all finite, as far as the device has told."
        self._nonfinite = Counter("gpu_adam_nonfinite_gradients_total", text, _LABELS, registry=registry)
        self._clients = Gauge("gpu_adam_clients", "Clients that use the optimizer.", _LABELS, registry=registry)
        text = "Since the newest checkpoint was written, or was restored."
        self._age = Gauge("gpu_adam_checkpoint_age_seconds", text, _LABELS, registry=registry)
        self._counted = dict.fromkeys(server.optimizers, 0)
        for optimizer in server.optimizers.values():
            self._watch(optimizer)

    def _watch(self, optimizer: ServedOptimizer) -> None:
        labels = (optimizer.name, *self._device)
        steps, seconds = self._steps.labels(*labels), self._seconds.labels(*labels)

        def observe(duration: float) -> None:
            steps.inc()
            seconds.observe(duration)

        optimizer.observe_step = observe

    def text(self) -> bytes:
        """What a scrape gets."""
        for name, optimizer in self._server.optimizers.items():
            labels = (name, *self._device)
            self._clients.labels(*labels).set(len(self._server.clients_of(name)))
            if (age := optimizer.checkpoint_age) is not None:
                self._age.labels(*labels).set(age)
            if (found := optimizer.nonfinite_steps) is not None:
                self._nonfinite.labels(*labels).inc(found - self._counted[name])
                self._counted[name] = found
        return generate_latest(self._registry)
