"""Does a flavour of Adam take the time that its memory traffic predicts? What do first steps take, and changing ones?

    python profiling/flavours.py                           one variable of 32 M elements on the host
    python profiling/flavours.py --only "bfloat16" --turns 40
    python profiling/flavours.py --first-step host cuda    compile times; on "cuda" also of an emulated driver
    python profiling/flavours.py --changing                a random half of 1000 parameters, beside torch's fused Adam

Every flavour takes turns with plain float32 Adam. The figure is the median over the turns of the quotient of the two
times, divided by the quotient of the bytes that the two must move. First steps run in processes of their own: "cold"
with empty caches of compiled kernels, "warm" once more with what the first has left there; imports do not count. On a
busy machine look at the processor time, which is that of the process and of the compilers that it runs. A step with
other parameters than the last one is timed by that time alone, after as many such steps as are timed; set
GPU_ADAM_THREADS=1 there.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import gpu_adam
from gpu_adam.bench.clocks import Candidate, Effort, Step, WallClock, measure
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.tables import markdown
from gpu_adam.bench.workloads import M, Workload, many
from gpu_adam.devices import Device, HostDevice
from gpu_adam.kernels import dtype_named

SIZE = 32 * M


@dataclass(frozen=True)
class Flavour:
    """A step to be timed.

    Attributes:
        keywords: of the optimizer.
        dtype: of the variable.
        gradient: dtype of the gradient; "" for the variable's.
        scale: `grad_scale` of the step.
        reads: how often the step reads the gradient.
        accumulates: whether a call of `accumulate` is timed in place of a step.
    """

    keywords: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    gradient: str = ""
    scale: float | None = None
    reads: int = 1
    accumulates: bool = False


PLAIN = Flavour()
FLAVOURS = {
    "plain": PLAIN,
    "amsgrad": Flavour({"amsgrad": True}),
    "weight_decay": Flavour({"weight_decay": 0.01}),
    "l2": Flavour({"l2": 0.01}),
    "maximize": Flavour({"maximize": True}),
    "epsilon_form paper": Flavour({"epsilon_form": "paper"}),
    "use_ema": Flavour({"use_ema": True}),
    "grad_scale": Flavour(scale=1024.0),
    "clipvalue": Flavour({"clipvalue": 0.5}),
    "global_clipnorm": Flavour({"global_clipnorm": 1.0}, reads=2),
    "skip_nonfinite": Flavour({"skip_nonfinite": True}, reads=2),
    "loss_scale": Flavour({"loss_scale": {}}, reads=2),
    "telemetry": Flavour({"telemetry": True}, reads=2),
    "slot_dtype": Flavour({"slot_dtype": "bfloat16"}),
    "gradient of bfloat16": Flavour(gradient="bfloat16"),
    "accumulate": Flavour(accumulates=True),
    "bfloat16": Flavour(dtype="bfloat16"),
    "bfloat16, gradient of float32": Flavour(dtype="bfloat16", gradient="float32"),
    "bfloat16, slot_dtype": Flavour({"slot_dtype": "bfloat16"}, "bfloat16"),
    "bfloat16, stochastic_rounding": Flavour({"stochastic_rounding": True}, "bfloat16"),
    "bfloat16, master_weights": Flavour({"master_weights": True}, "bfloat16"),
    "bfloat16, use_ema": Flavour({"use_ema": True}, "bfloat16"),
    "float16": Flavour(dtype="float16"),
    "float16, master_weights": Flavour({"master_weights": True}, "float16"),
    "float16, use_ema": Flavour({"use_ema": True}, "float16"),
    "float16, global_clipnorm": Flavour({"global_clipnorm": 1.0}, "float16", reads=2),
    "float16, telemetry": Flavour({"telemetry": True}, "float16", reads=2),
}

_EVERYTHING = {"amsgrad": True, "clipvalue": 1.0, "use_ema": True, "weight_decay": 0.01}
_SKIPPING = {"global_clipnorm": 1.0, "loss_scale": {}, "master_weights": True, "slot_dtype": "bfloat16"}
FIRST_STEPS = {
    "plain float32": PLAIN,
    "complex128, amsgrad ema adjust bounded": Flavour(_EVERYTHING, "complex128"),
    "bfloat16, the same and master, slots, norm, loss scale": Flavour({**_EVERYTHING, **_SKIPPING}, "bfloat16"),
}
_PROGRAM = """
import os, time, numpy, gpu_adam
from gpu_adam.kernels import dtype_named
if "{device}" != "host": import cupy
worked, start = sum(os.times()[:4]), time.perf_counter()
variable = gpu_adam.Variable(numpy.ones(10, dtype_named("{flavour.dtype}")), device="{device}")
adam = gpu_adam.Adam(**{flavour.keywords})
adam.apply_gradients([(variable.value, variable)])
adam.synchronize()
print(time.perf_counter() - start, sum(os.times()[:4]) - worked)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression for the flavours' names")
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--size", type=int, default=SIZE, help="elements of the variable")
    parser.add_argument("--first-step", nargs="+", metavar="DEVICE", help="time first steps on these devices instead")
    parser.add_argument("--changing", action="store_true", help="time steps of other parameters each time instead")
    options = parser.parse_args(arguments)
    if options.changing:
        header = ("parameters with a gradient", *STEPPERS, *(f"{name} / {FUSED}" for name in list(STEPPERS)[1:]))
        print(markdown(header, changing(options.turns)))
        return
    if options.first_step:
        rows = first_steps(options.first_step, options.only)
        print(markdown(("first step", "device", "cold", "cold, processor time", "warm", "warm, processor time"), rows))
        return
    header = ("flavour", "bytes per parameter", "predicted", "measured", "measured / predicted")
    print(markdown(header, times(options.only, options.size, options.turns)))


def times(only: str, size: int, turns: int) -> Iterator[tuple[str, str, str, str, str]]:
    """A row for each flavour: bytes per parameter, predicted and measured time beside plain Adam's, and their ratio."""
    device, effort = HostDevice(), Effort(turns, turns, 0.0, 0.0)
    step, plain_bytes = step_of(PLAIN, size, device)
    plain = Candidate("plain", [step], WallClock(device.synchronize))
    for name, flavour in FLAVOURS.items():
        if not re.search(only, name):
            continue
        step, moved = step_of(flavour, size, device)
        other = Candidate(name, [step], plain.clock)
        plain.samples.clear()
        measure([plain, other], effort)
        measured = statistics.median(b / a for a, b in zip(plain.samples, other.samples, strict=True))
        predicted = moved / plain_bytes
        yield name, f"{moved / size:g}", f"{predicted:.2f}", f"{measured:.2f}", f"{measured / predicted:.2f}"


def step_of(flavour: Flavour, size: int, device: Device) -> tuple[Step, int]:
    """A step of a new variable, and the bytes that it must read and write."""
    inputs = Inputs(Workload("", many(1, size), flavour.dtype), 0)
    variable = gpu_adam.Variable.over(device.array(inputs.theta(0)), device, "variable")
    gradient = device.array(inputs.gradient(0).astype(dtype_named(flavour.gradient or flavour.dtype)))
    pairs = [(gradient, variable)]
    adam = gpu_adam.Adam(**flavour.keywords)
    if flavour.accumulates:
        return lambda: adam.accumulate(pairs), gradient.nbytes + 2 * 4 * size
    adam.build([variable])
    slots = sum(slot.size * slot.dtype.itemsize for slot in adam.weights[1:])
    is_read = not flavour.keywords.get("master_weights")  # else the master is, in the variable's place
    moved = flavour.reads * gradient.nbytes + (1 + is_read) * variable.value.nbytes + 2 * slots
    return lambda: adam.apply_gradients(pairs, grad_scale=flavour.scale), moved


def first_steps(devices: Sequence[str], only: str) -> Iterator[tuple[str, ...]]:
    """A row for each flavour of FIRST_STEPS and device: seconds of the first step without and with compiled kernels."""
    for name, flavour in FIRST_STEPS.items():
        for device in devices:
            if not re.search(only, name):
                continue
            with tempfile.TemporaryDirectory() as cache:
                seconds = [each for _ in range(2) for each in seconds_of_first_step(flavour, device, Path(cache))]
            yield name, device, *(f"{each:.2f} s" for each in seconds)


def seconds_of_first_step(flavour: Flavour, device: str, cache: Path) -> list[float]:
    """Seconds of a process's first step, without its imports, and of the processors' work for it."""
    caches = {"GPU_ADAM_CACHE": str(cache / "host"), "CUPY_CACHE_DIR": str(cache / "cupy")}
    program = _PROGRAM.format(device=device, flavour=flavour)
    call = [sys.executable, "-c", program]
    done = subprocess.run(call, check=True, env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True)
    return [float(word) for word in done.stdout.split()]


FUSED = "torch fused"
PARAMETERS, ELEMENTS = 1000, 1000


def changing(turns: int) -> Iterator[tuple[str, ...]]:
    """A row for steps of all of 1000 parameters, and one for steps of a random half, each time another one.

    Each has every optimizer's time, taken by turns, and the medians of the quotients of these times and torch's.
    """
    for name, share in ((f"all of {PARAMETERS}", 1.0), ("a random half", 0.5)):
        rng, steppers = random.Random(0), [make() for make in STEPPERS.values()]
        samples: list[list[float]] = [[] for _ in steppers]
        for turn in range(2 * turns):
            present = [rng.random() < share for _ in range(PARAMETERS)]
            for stepper, seconds in zip(steppers, samples, strict=True):
                step = stepper(present)
                start = time.process_time()
                step()
                if turn >= turns:
                    seconds.append(time.process_time() - start)
        quotients = [[b / a for a, b in zip(samples[0], own, strict=True)] for own in samples[1:]]
        times = (f"{1e3 * statistics.median(seconds):.2f} ms" for seconds in samples)
        yield name, *times, *(f"{statistics.median(quotient):.2f}" for quotient in quotients)


def _torch_stepper(of: str) -> Callable[[Sequence[bool]], Step]:
    """A function that gives gradients to some of its parameters; the step over these is what it returns."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    parameters = [torch.ones(ELEMENTS, requires_grad=True) for _ in range(PARAMETERS)]
    gradients = [torch.full((ELEMENTS,), 0.1) for _ in range(PARAMETERS)]
    optimizer: Any = torch.optim.Adam(parameters, fused=True) if of == "torch" else gpu_adam.torch.Adam(parameters)

    def stepper(present: Sequence[bool]) -> Step:
        for parameter, gradient, is_present in zip(parameters, gradients, present, strict=True):
            parameter.grad = gradient if is_present else None
        return optimizer.step  # type: ignore[no-any-return]

    return stepper


def _own_stepper() -> Callable[[Sequence[bool]], Step]:
    device = HostDevice(threads=1)
    variables = [gpu_adam.Variable(np.ones(ELEMENTS, np.float32), device=device) for _ in range(PARAMETERS)]
    gradients = [device.array(np.full(ELEMENTS, 0.1, np.float32)) for _ in range(PARAMETERS)]
    adam = gpu_adam.Adam()

    def stepper(present: Sequence[bool]) -> Step:
        pairs = [
            pair for pair, is_present in zip(zip(gradients, variables, strict=True), present, strict=True) if is_present
        ]
        return lambda: adam.apply_gradients(pairs)

    return stepper


STEPPERS = {
    FUSED: lambda: _torch_stepper("torch"),
    "gpu_adam.torch": lambda: _torch_stepper("gpu_adam"),
    "gpu_adam.Adam": _own_stepper,
}


if __name__ == "__main__":
    main()
