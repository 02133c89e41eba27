"""The commands of `gpu-adam`: display only; what is shown is computed elsewhere."""

import os
import platform
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import gpu_adam
from gpu_adam import communicators, devices
from gpu_adam.bench import commands as bench_commands
from gpu_adam.communicators import Communicator, Mpi, local_rank
from gpu_adam.demos import Demo
from gpu_adam.demos.digits import Digits
from gpu_adam.demos.ptychography import Ptychography, require
from gpu_adam.demos.words import Words
from gpu_adam.devices import Device, find_device
from gpu_adam.errors import ArgumentValueError, GpuAdamError
from gpu_adam.files import commands as file_commands
from gpu_adam.held_signals import HeldSignals
from gpu_adam.kernels import HALVES
from gpu_adam.service import Client, connect
from gpu_adam.service import commands as service_commands

app = typer.Typer(
    help="Adam as CUDA kernels, on NVIDIA GPUs and on the CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
READ_SECONDS = 0.1  # reading the loss waits for the device
DEMOS: dict[str, type[Demo]] = {demo.name: demo for demo in (Digits, Words, Ptychography)}


class What(str, Enum):
    """The demos, as typer wants a choice."""

    digits = "digits"
    words = "words"
    ptychography = "ptychography"


class Precision(str, Enum):
    """The dtypes of a demo's variables, as typer wants a choice."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"


class SparseUpdate(str, Enum):
    """When a demo's tables move the rows that have no gradient, as typer wants a choice."""

    dense = "dense"
    deferred = "deferred"


@app.command()
def demo(
    what: Annotated[
        What,
        typer.Argument(
            help="What to learn: handwritten digits, word vectors, or a cell's picture from scattered light."
        ),
    ] = What.digits,
    *,
    device: Annotated[str | None, typer.Option(help="auto, host, cuda or cuda:N; default: GPU_ADAM_DEVICE.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Train until this step; default: what it needs.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed, another training; default: 0.")] = None,
    save: Annotated[Path | None, typer.Option(help="File for the state, at the end or when interrupted.")] = None,
    resume: Annotated[Path | None, typer.Option(help="File of an earlier --save, to continue bit for bit.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a picture of the result; ptychography only.")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Of the variables; digits only; default: float32.")] = None,
    master: Annotated[bool, typer.Option("--master", help="Keep variables of 16 bits in 32 bits too.")] = False,
    sparse: Annotated[
        SparseUpdate | None,
        typer.Option(help="When rows without gradient move: each step, or when needed; words only; default: dense."),
    ] = None,
    watch: Annotated[bool, typer.Option(help="Show the gradients' norm, and how many are not finite.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Share each batch, as one of the processes of mpiexec; digits only.")
    ] = False,
    replicated: Annotated[
        bool, typer.Option("--replicated", help="With --distributed: all slots in each process, not a share of them.")
    ] = False,
    service: Annotated[
        Path | None, typer.Option(help="Train the variables of the service with this socket; digits only.")
    ] = None,
) -> None:
    """Train a small model on real data."""
    kind = DEMOS[what.value]
    last = steps or kind.default_steps
    alone = {"--save": save, "--resume": resume, "--plot": plot, "--watch": watch or None}
    _check_distributed(kind, distributed, alone if distributed else {"--replicated": replicated or None})
    if service is not None:
        _check_served(kind, {**alone, "--distributed": distributed or None, "--dtype": dtype, "--device": device})
    for option, target in (("--save", save), ("--plot", plot)):
        if target is not None:
            _check_target(option, target)
    if plot is not None:
        if kind is not Ptychography:
            raise ArgumentValueError("--plot", "must be left out where there is no picture", what.value, "leave it out")
        require("matplotlib", "matplotlib")
    options = {"dtype": dtype and dtype.value, "master": master, "sparse": sparse and sparse.value}
    choices = _choices(kind, resume is None, **options)
    try:
        with _placed(device, distributed) as ranks, _client(service) as client:
            together: dict[str, Any] = {"ranks": ranks, "replicated": replicated} if ranks else {}
            together |= {} if client is None else {"service": client}
            training = _resumed(kind, resume, seed, choices) if resume else kind(seed or 0, **choices, **together)
            if training.step >= last:
                rule = f"must be above {training.step}, the step that {resume} has reached"
                raise ArgumentValueError("--steps", rule, last, "pass a larger number")
            if watch:
                training.watch()
            console = Console(quiet=bool(ranks and ranks.rank > 0))
            figures = _train(training, last, save, console)
            if ranks:
                figures.append(("ranks", f"{ranks.size}, of which rank 0 had this loss for its share of the batch"))
            if save is not None:
                training.save(save)
                figures.append(("saved", f"{save}, continue with --resume"))
            if plot is not None and isinstance(training, Ptychography):
                training.plot(plot)
                figures.append(("picture", str(plot)))
            figures += training.result()
    except KeyboardInterrupt as interrupt:
        say(f"The demo {what.value} was interrupted {str(interrupt) or 'before its first step was done'}.", "yellow")
        raise typer.Exit(130) from None
    grid = Table.grid(padding=(0, 2))
    for label, value in figures:
        grid.add_row(Text(label, "bold"), Text(value))
    console.print(grid)


@app.command()
def info() -> None:
    """Print what runs where, and what is missing."""
    try:
        chosen = gpu_adam.get_device().name
    except GpuAdamError as error:
        chosen = str(error)
    software = [("gpu_adam", gpu_adam.__version__), ("Python", platform.python_version()), ("NumPy", np.__version__)]
    sections = [
        ("software", software),
        *devices.describe(),
        *communicators.describe(),
        ("default", [("device", chosen)]),
    ]
    table = Table(show_header=False)
    for section, facts in sections:
        if section != "missing":
            for i, (label, value) in enumerate(facts):
                # Paths may hold bytes that are no text, which no terminal takes.
                table.add_row(Text("" if i else section, "bold"), label, Text(value.encode(errors="replace").decode()))
            table.add_section()
    console = Console()
    console.print(table)
    missing = [fact for section, facts in sections if section == "missing" for fact in facts]
    for label, sentence in missing:
        console.print(Text(f"Missing for {label}: {sentence}", "yellow"), soft_wrap=True)
    if not missing:
        console.print("Nothing is missing.")


app.command()(bench_commands.bench)
app.command()(bench_commands.profile)
app.command()(file_commands.inspect)
app.command()(file_commands.convert)
app.command()(service_commands.serve)


def say(sentence: str, style: str) -> None:
    """Print a sentence on stderr, in the colour `style` where that is a terminal."""
    Console(stderr=True).print(Text(sentence, style), soft_wrap=True)


def _check_distributed(kind: type[Demo], distributed: bool, others: Mapping[str, object]) -> None:
    """Refuse what several processes cannot do, or one alone, before MPI has started."""
    if distributed and kind is not Digits:
        rule = "must be left out where the demo shares no batches"
        raise ArgumentValueError("--distributed", rule, kind.name, "leave it out")
    for option, value in others.items():
        if value is not None:
            rule = f"must be left out {'with' if distributed else 'without'} --distributed"
            raise ArgumentValueError(option, rule, value, "leave it out")


def _check_served(kind: type[Demo], others: Mapping[str, object]) -> None:
    """Refuse what a client of a service does not choose."""
    if kind is not Digits:
        raise ArgumentValueError("--service", "must be left out where no service can train", kind.name, "leave it out")
    for option, value in others.items():
        if value is not None:
            raise ArgumentValueError(option, "must be left out with --service, which has it", value, "leave it out")


def _client(socket: Path | None) -> AbstractContextManager[Client | None]:
    """A client of a service, whose device becomes this process's."""
    if socket is None:
        return nullcontext()
    client = connect(socket)
    gpu_adam.set_device(client.device)
    return client


def _placed(device: str | None, distributed: bool) -> AbstractContextManager[Communicator | None]:
    """Choose this process's device, among the processes of mpiexec where it is one of them."""
    if distributed:
        ranks = Mpi(device=_own_device(device))
        gpu_adam.set_device(ranks.device)
        return ranks
    if device is not None:
        gpu_adam.set_device(device)
    return nullcontext()


def _own_device(name: str | None) -> Device:
    """The device of that name, of which each process of a machine has one of its own where no number is named."""
    name = name or os.environ.get("GPU_ADAM_DEVICE") or "auto"
    device = find_device(name)
    if ":" in name or not device.name.startswith("cuda"):
        return device
    # Slurm may show each process a single GPU, number 0 to all of them.
    return find_device(f"cuda:{local_rank() % device.xp.cuda.runtime.getDeviceCount()}")


def _check_target(option: str, save: Path) -> None:
    """Refuse before the training what could not be written after it."""
    parent = save.absolute().parent
    is_special = save.exists() and not save.is_file()  # a FIFO is written into, a file is replaced in its directory
    places = [*([save] if save.exists() else []), *([] if is_special else [parent])]
    if save.is_dir() or not parent.is_dir() or not all(os.access(place, os.W_OK) for place in places):
        raise ArgumentValueError(option, "must be a file in a writable directory", save, "choose another path")


def _choices(kind: type[Demo], is_new: bool, **options: Any) -> dict[str, Any]:
    """What was chosen of what the demo leaves to its user."""
    choices = {name: value for name, value in options.items() if value}
    for name in choices:
        if name not in kind.defaults:
            rule = "must be left out where the demo has no choice of it"
            raise ArgumentValueError(f"--{name}", rule, kind.name, "leave it out")
    if is_new and choices.get("master") and (dtype := {**kind.defaults, **choices}["dtype"]) not in HALVES:
        rule = f"must come with --dtype {' or '.join(HALVES)}, which are rounded to 16 bits"
        raise ArgumentValueError("--master", rule, dtype, "leave it out")
    return choices


def _resumed(kind: type[Demo], resume: Path, seed: int | None, choices: Mapping[str, Any]) -> Demo:
    if not resume.is_file():
        raise ArgumentValueError("--resume", "must be a file", resume, "pass the FILE of an earlier --save")
    training = kind.resume(resume)
    saved = {"seed": training.seed, **training.choices}
    for name, value in {**({} if seed is None else {"seed": seed}), **choices}.items():
        if value != saved[name]:
            rule = f"must be {saved[name]}, as in {resume}"
            raise ArgumentValueError(f"--{name}", rule, value, f"leave --{name} out")
    return training


def _train(training: Demo, last: int, save: Path | None, console: Console) -> list[tuple[str, str]]:
    """Train until step `last` under a progress bar; return device, speed and loss as (label, value)."""
    with _Bar(training, last, console) as bar:
        begin = time.perf_counter()
        training.train()
        bar.show(now=True)
        first, start = training.step, time.perf_counter()
        with HeldSignals(signal.SIGINT) as held:
            while training.step < last and held.received is None:
                training.train()
                bar.show()
        bar.show(now=True)
        seconds = time.perf_counter() - start
    if held.received is not None:
        raise KeyboardInterrupt(_keep(training, last, save))
    speed = f"{(last - first) / seconds:.0f} in {seconds:.1f} s" if last > first else "only one step"
    return [
        ("device", f"{training.device.name}, {training.device.facts()[0][1]}"),
        ("first step", f"{start - begin:.2f} s (compiles the kernels that are not cached)"),
        ("steps/s", speed),
        ("last loss", f"{training.measure().loss:#.5g}"),
        *([("last step", watched)] if (watched := _watched(training)) else []),
    ]


def _watched(training: Demo) -> str:
    """What the optimizer's telemetry says of the last step that is done; nothing where it is off."""
    found = training.optimizer.read_telemetry() if training.is_watched else None
    if found is None:
        return ""
    norms = f"update {found.update_norm:.3g} of {found.param_norm:.3g}"
    return f"gradient {found.grad_norm:.3g}, {norms}, {found.nonfinite} not finite"


def _keep(training: Demo, last: int, save: Path | None) -> str:
    done = f"after step {training.step} of {last}"
    if save is None:
        return f"{done}; without --save its state is gone"
    training.save(save)
    return f"{done}; continue with: gpu-adam demo {training.name} --steps {last} --resume {save}"


class _Bar:
    """A progress bar of a training; it reads the loss only every READ_SECONDS."""

    def __init__(self, training: Demo, last: int, console: Console) -> None:
        state = TextColumn("{task.fields[state]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), state, TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._training, self._step, self._time = training, training.step, time.perf_counter()
        self._task = self._progress.add_task(training.name, total=last, completed=training.step, state="first step")

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, now: bool = False) -> None:
        """Show the present step and its numbers if it is time, or `now`."""
        done = self._training.step - self._step
        if done == 0 or not (now or time.perf_counter() - self._time > READ_SECONDS):
            return
        measure = self._training.measure()
        pace = (time.perf_counter() - self._time) / done * 1e3
        state = "  ".join([self._training.shown.format(measure), f"{pace:.2f} ms/step", _watched(self._training)])
        self._progress.update(self._task, completed=self._training.step, state=state)
        self._step, self._time = self._training.step, time.perf_counter()
