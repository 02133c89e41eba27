"""What does a step on several ranks take, beside PyTorch's? Where does its time go? What would limit larger machines?

    python profiling/distributed.py                     1, 2 and 4 ranks on this machine's processors, in a few minutes
    python profiling/distributed.py --quick             small arrays, two turns: whether it works
    python profiling/distributed.py --json profiling/results/distributed.json
    python profiling/distributed.py --model             the table of larger machines alone

Each number of ranks is a job of mpiexec, in which all candidates take turns; a time is the median over the turns of the
slowest rank's. Before they are timed, the first step of each is compared with Adam's equations. Every rank has as many
threads as there are processors for it. PyTorch's candidates are left out where it is missing.

    steps      candidates that get gradients as arrays, and beside them what MPI alone takes to move the same bytes
    training   the same under PyTorch's backward pass, whose gradients cost nothing: ours by a hook on each parameter
    stages     where the time of a step goes
    overlap    how much longer than a backward pass alone it takes with the step, by buckets and by when gradients come
    memory     what a rank holds besides the gradients that it was given, and the formula of `ShardedAdam`
    python     processor time of Python for a step, a bucket and a variable, of a rank that waits for nobody
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gpu_adam
from gpu_adam.bench.tables import duration, markdown
from gpu_adam.communicators import Alone, Mpi
from gpu_adam.devices import find_device
from gpu_adam.distributed import DataParallelAdam, ShardedAdam
from gpu_adam.distributed.shards import ArrayShard

RATE, EPSILON = 0.01, 0.1
"""With so large an epsilon, a step tells a mean of gradients from their sum."""

MIB, GIB = 2**20, 2**30
OURS = "ShardedAdam"

Step = Callable[[], object]


class Shapes(NamedTuple):
    """A model: so many parameters of so many elements each."""

    number: int
    size: int


class Candidate(NamedTuple):
    """What is timed.

    Attributes:
        step: one step, done when it returns.
        parameters: all parameters, one after the other; None for what updates none.
    """

    step: Step
    parameters: Callable[[], np.ndarray] | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="2 ranks, small arrays, two turns")
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--model", action="store_true", help="print the table of larger machines, and measure nothing")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.ranks, options.turns = options.ranks if options.job else [2], 2
    if options.job:
        job(options.turns, quick=options.quick)
        return
    if not options.model:
        results: dict[str, Any] = {"facts": facts(), "jobs": [started(ranks, options) for ranks in options.ranks]}
        results["facts"]["load after"] = os.getloadavg()
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
        print("\n\n".join(tables(results)), end="\n\n")
    print(markdown(MODEL_HEADER, model()))


def facts() -> dict[str, Any]:
    """Where and when this is measured."""
    versions = {name: version(name) for name in ("gpu_adam", "mpi4py", "mpich", "torch", "numpy")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": dict(find_device("host").facts())["processor"],
        "cores": len(os.sched_getaffinity(0)),
        "load before": os.getloadavg(),
        "versions": {"python": platform.python_version(), **{k: v for k, v in versions.items() if v}},
    }


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def started(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a job of so many ranks finds."""
    beside = Path(sys.executable).with_name("mpiexec")
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None:
        raise SystemExit('mpiexec is missing: pip install "gpu-adam[mpi]"')
    command = [launcher, "-n", str(ranks), sys.executable, str(Path(__file__).resolve()), "--job"]
    command += ["--turns", str(options.turns), *(["--quick"] if options.quick else [])]
    # BLAS and OpenMP of every rank would each take all processors.
    each = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = {**os.environ, "OMP_NUM_THREADS": each, "OPENBLAS_NUM_THREADS": each}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# What one job measures.


def job(turns: int, *, quick: bool) -> None:
    """Measure as one of the ranks; rank 0 prints JSON."""
    large, many = (Shapes(8, 10_000), Shapes(20, 100)) if quick else (Shapes(32, 250_000), Shapes(1000, 1000))
    with Mpi(device="host") as ranks:
        kinds: dict[str, Callable[[Ranks], dict[str, Candidate]]] = {"steps": steps, "training": training}
        found: dict[str, Any] = {"ranks": ranks.size, "elements": large.number * large.size}
        for name, make in kinds.items():
            for title, shapes in (("large", large), ("many", many)):
                found[f"{name}, {title}"] = timed(Ranks(ranks, shapes), make, turns)
        found["stages"] = stages(Ranks(ranks, large), turns)
        found["overlap"] = overlap(Ranks(ranks, large), turns)
        found["memory"] = memory(ranks, large)
        found["python"] = python_time(quick=quick)
        if ranks.rank == 0:
            print(json.dumps(found), flush=True)


class Ranks:
    """The ranks of a job, and the gradients of a model on this one.

    Args:
        communicator: of the ranks.
        shapes: of the model.
    """

    def __init__(self, communicator: Mpi, shapes: Shapes) -> None:
        self.communicator, self.shapes = communicator, shapes
        rng = np.random.default_rng(communicator.rank)
        self.gradients = [rng.standard_normal(shapes.size, np.float32) for _ in range(shapes.number)]

    def variables(self) -> list[gpu_adam.Variable]:
        """New parameters, of zeros."""
        zeros = np.zeros(self.shapes.size, np.float32)
        return [gpu_adam.Variable(zeros, name=f"w{number}", device="host") for number in range(self.shapes.number)]

    def after_one_step(self) -> np.ndarray:
        """What the parameters are after a step of Adam from zero."""
        total = np.concatenate(self.gradients)
        self.communicator.all_reduce(total, total).wait()
        mean = total / self.communicator.size
        return np.asarray(-RATE * mean / (abs(mean) + EPSILON))


def largest(communicator: Mpi, number: float) -> float:
    """The largest number that a rank has."""
    mine, everybodys = np.array([number], np.float64), np.zeros(communicator.size)
    communicator.all_gather(mine, everybodys).wait()
    return float(everybodys.max())


def timed(ranks: Ranks, make: Callable[[Ranks], dict[str, Candidate]], turns: int) -> dict[str, float]:
    """Seconds of a step of each candidate, taken by turns."""
    candidates, expected = make(ranks), ranks.after_one_step()
    for name, candidate in candidates.items():
        candidate.step()
        if candidate.parameters is not None:
            np.testing.assert_allclose(candidate.parameters(), expected, rtol=0, atol=1e-5, err_msg=name)
    return by_turns(ranks, {name: candidate.step for name, candidate in candidates.items()}, turns)


def by_turns(ranks: Ranks, candidates: dict[str, Step], turns: int) -> dict[str, float]:
    """The median over the turns of the slowest rank's seconds; the first turn does not count."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(turns + 1):
        for name, step in candidates.items():
            ranks.communicator.barrier()
            begin = time.perf_counter()
            step()
            seconds = largest(ranks.communicator, time.perf_counter() - begin)
            if turn:
                samples[name].append(seconds)
    return {name: statistics.median(each) for name, each in samples.items()}


def steps(ranks: Ranks) -> dict[str, Candidate]:
    """Steps by gradients that are arrays; what MPI takes for their bytes; the update of a rank's share."""

    def ours(kind: type[Any], **options: Any) -> Candidate:
        variables = ranks.variables()
        adam = kind(ranks.communicator, RATE, epsilon=EPSILON, epsilon_form="paper", **options)
        pairs = list(zip(ranks.gradients, variables, strict=True))
        return Candidate(lambda: adam.apply_gradients(pairs), partial(flat, variables))

    size = ranks.communicator.size
    share = -(-ranks.shapes.number * ranks.shapes.size // size)
    part, adam = gpu_adam.Variable(np.zeros(share, np.float32), device="host"), gpu_adam.Adam(RATE)
    gradient = np.ones(share, np.float32)
    return {
        OURS: ours(ShardedAdam),
        f"{OURS}, deterministic": ours(ShardedAdam, deterministic=True),
        "DataParallelAdam": ours(DataParallelAdam),
        "MPI alone": Candidate(mpi_alone(share)),
        "Adam of a share": Candidate(lambda: adam.apply_gradients([(gradient, part)])),
    }


def mpi_alone(share: int) -> Step:
    """A blocking reduce-scatter of gradients and all-gather of parameters, by MPI itself, each one operation."""
    from mpi4py import MPI  # noqa: PLC0415  (not for --help)

    comm = MPI.COMM_WORLD
    send, received = np.ones(share * comm.size, np.float32), np.zeros(share, np.float32)
    parameters = np.zeros(share * comm.size, np.float32)

    def step() -> None:
        comm.Reduce_scatter_block(send, received)
        comm.Allgather(MPI.IN_PLACE, parameters)

    return step


def flat(variables: Sequence[Any]) -> np.ndarray:
    """The elements of variables one after the other."""
    return np.concatenate([variable.numpy().reshape(-1) for variable in variables])


def training(ranks: Ranks) -> dict[str, Candidate]:
    """Steps of PyTorch's modules, whose backward pass hands out gradients that are there already."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch  # noqa: PLC0415  (optional)
    from torch import distributed  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415
    from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415

    rank, size = ranks.communicator.rank, ranks.communicator.size
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    if not distributed.is_initialized():
        own = distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) if rank == 0 else None
        port = largest(ranks.communicator, own.port if own else 0)
        store = own or distributed.TCPStore("127.0.0.1", int(port), None, False)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)

    class Given(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(context: Any, parameter: Any, gradient: Any) -> Any:
            context.gradient = gradient
            return parameter.new_zeros(())

        @staticmethod
        def backward(context: Any, _: Any) -> Any:
            return context.gradient, None

    class Layer(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, gradients: Sequence[np.ndarray]) -> None:
            super().__init__()
            self.own = torch.nn.ParameterList(torch.zeros(len(gradient)) for gradient in gradients)
            self.gradients = [torch.from_numpy(gradient) for gradient in gradients]

        def forward(self, total: Any) -> Any:
            return sum(map(Given.apply, self.own, self.gradients), total)

    def network() -> Any:
        each = -(-len(ranks.gradients) // 8)
        parts = [ranks.gradients[begin : begin + each] for begin in range(0, len(ranks.gradients), each)]
        return torch.nn.Sequential(*map(Layer, parts))

    def step_of(module: Any, optimizer: Any) -> Step:
        def step() -> None:
            optimizer.zero_grad()
            module(torch.zeros(())).backward()
            optimizer.step()

        return step

    def ours() -> Candidate:
        module, variables = network(), ranks.variables()
        adam = ShardedAdam(ranks.communicator, RATE, epsilon=EPSILON, epsilon_form="paper")
        adam.build(variables)

        def push(variable: gpu_adam.Variable, parameter: Any) -> None:
            adam.push_gradient(variable, parameter.grad.numpy())
            parameter.grad = None

        for parameter, variable in zip(module.parameters(), variables, strict=True):
            parameter.data = torch.from_numpy(variable.value)
            parameter.register_post_accumulate_grad_hook(partial(push, variable))

        def step() -> None:
            module(torch.zeros(())).backward()
            adam.apply_gradients()

        return Candidate(step, partial(flat, variables))

    def zero() -> Candidate:
        module = DistributedDataParallel(network(), gradient_as_bucket_view=True)
        optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.Adam, lr=RATE, eps=EPSILON, fused=True)
        return Candidate(step_of(module, optimizer), lambda: numbers(module.parameters()))

    def fsdp() -> Candidate:
        module = network()
        for layer in module:
            fully_shard(layer, reshard_after_forward=False)
        fully_shard(module, reshard_after_forward=False)
        optimizer = torch.optim.Adam(module.parameters(), lr=RATE, eps=EPSILON, fused=True)
        return Candidate(
            step_of(module, optimizer), lambda: numbers(parameter.full_tensor() for parameter in module.parameters())
        )

    def numbers(tensors: Any) -> np.ndarray:
        return np.concatenate([tensor.detach().numpy() for tensor in tensors])

    return {OURS: ours(), "DDP, ZeroRedundancyOptimizer": zero(), "FSDP": fsdp()}


STAGES: dict[str, tuple[tuple[type, str], ...]] = {
    "copy into buckets": ((ArrayShard, "push"),),
    "reduce-scatter": ((ArrayShard, "begin"), (ArrayShard, "arrive")),
    "all-gather": ((ArrayShard, "depart"), (ArrayShard, "finish")),
}


def stages(ranks: Ranks, turns: int) -> dict[str, float]:
    """Median seconds of each stage of a step on rank 0."""
    spent = dict.fromkeys(STAGES, 0.0)
    kept = {place: getattr(*place) for places in STAGES.values() for place in places}

    def clocked(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*arguments, **keywords)
            finally:
                spent[stage] += time.perf_counter() - begin

        return call

    for stage, places in STAGES.items():
        for place in places:
            setattr(*place, clocked(stage, kept[place]))
    try:
        adam, variables = ShardedAdam(ranks.communicator, RATE), ranks.variables()
        pairs = list(zip(ranks.gradients, variables, strict=True))
        samples: list[dict[str, float]] = []
        for _ in range(turns + 1):
            spent.update(dict.fromkeys(STAGES, 0.0))
            ranks.communicator.barrier()
            begin = time.perf_counter()
            adam.apply_gradients(pairs)
            whole = time.perf_counter() - begin
            samples.append({**spent, "update, and Python": whole - sum(spent.values()), "step": whole})
    finally:
        for place, method in kept.items():
            setattr(*place, method)
    return {name: statistics.median(sample[name] for sample in samples[1:]) for name in samples[0]}


def overlap(ranks: Ranks, turns: int) -> dict[str, float]:
    """Seconds of a backward pass that computes about as long as a step takes, alone and with steps."""
    each = ranks.gradients[0].nbytes
    plain = ShardedAdam(ranks.communicator, RATE)
    pairs = list(zip(ranks.gradients, ranks.variables(), strict=True))
    goal = by_turns(ranks, {"step": lambda: plain.apply_gradients(pairs)}, 2)["step"] / ranks.shapes.number
    matrix = np.ones((64, 64), np.float32)
    times = by_turns(ranks, {"100": lambda: [matrix @ matrix for _ in range(100)]}, 5)
    repeats = max(1, round(100 * goal / times["100"]))

    def layer() -> None:
        for _ in range(repeats):
            matrix @ matrix

    def backward(bucket_bytes: int | None, *, pushes: bool) -> Step:
        adam, variables = None, ranks.variables()
        if bucket_bytes is not None:
            adam = ShardedAdam(ranks.communicator, RATE, bucket_bytes=bucket_bytes)
            adam.build(variables)
        pairs = list(zip(ranks.gradients, variables, strict=True))[::-1]

        def step() -> None:
            for gradient, variable in pairs:
                layer()
                if adam is not None and pushes:
                    adam.push_gradient(variable, gradient)
            if adam is not None:
                adam.apply_gradients(None if pushes else pairs)

        return step

    candidates = {
        "backward alone": backward(None, pushes=False),
        "one bucket, at the end": backward(2**40, pushes=False),
        "one bucket, pushed": backward(2**40, pushes=True),
        "8 buckets, at the end": backward(each * ranks.shapes.number // 8, pushes=False),
        "8 buckets, pushed": backward(each * ranks.shapes.number // 8, pushes=True),
    }
    return by_turns(ranks, candidates, turns)


def memory(communicator: Mpi, shapes: Shapes) -> dict[str, list[float]]:
    """For each flavour the bytes that the fullest rank holds, and those of the formula."""
    found = {}
    for name, dtype, keywords, slot_bytes in (
        ("float32", "float32", {}, 8),
        ("float32, amsgrad", "float32", {"amsgrad": True}, 12),
        ("bfloat16, masters", "bfloat16", {"master_weights": True}, 12),
    ):
        rng, elements = np.random.default_rng(0), shapes.number * shapes.size
        given = [
            gpu_adam.Variable(rng.random(shapes.size), dtype=dtype, device="host").value for _ in range(shapes.number)
        ]
        parameters, share = elements * given[0].itemsize, elements / communicator.size
        formula = parameters + share * slot_bytes
        if communicator.size > 1:
            formula += parameters + 4 * share  # sums are of 32 bits
        held(communicator, given, dtype, keywords)  # the first time kernels are loaded, too
        found[name] = [largest(communicator, held(communicator, given, dtype, keywords)), formula]
    return found


def held(communicator: Mpi, gradients: Sequence[Any], dtype: str, keywords: dict[str, Any]) -> int:
    """Bytes that are held by variables, and by an optimizer that has stepped by such gradients."""
    tracemalloc.start()
    variables = [gpu_adam.Variable(np.zeros(each.size), dtype=dtype, device="host") for each in gradients]
    adam = ShardedAdam(communicator, RATE, **keywords)
    for _ in range(2):
        adam.apply_gradients(list(zip(gradients, variables, strict=True)))
    nbytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return nbytes


class Echo(Alone):
    """The first of two ranks, of which the other one sends what this one does: its buckets travel, and nobody waits."""

    def __init__(self) -> None:
        super().__init__("host")
        self.size = 2

    def _reduce_scatter(self, send: Any, recv: Any) -> Step:
        return self._copied(send[: recv.size], recv)

    def _all_gather(self, send: Any, recv: Any) -> Step:
        recv.reshape(2, -1)[...] = send
        return int


def python_time(*, quick: bool) -> dict[str, float]:
    """Seconds of processor time of a step of a rank: of one variable, and what each bucket and variable adds."""

    def seconds(count: int, bucket_bytes: int) -> float:
        adam = ShardedAdam(Echo(), RATE, bucket_bytes=bucket_bytes)
        variables = [gpu_adam.Variable(np.zeros(1, np.float32), device="host") for _ in range(count)]
        pairs = [(np.ones(1, np.float32), variable) for variable in variables]
        samples = []
        for _ in range(5 if quick else 200):
            begin = time.process_time()
            adam.apply_gradients(pairs)
            samples.append(time.process_time() - begin)
        return statistics.median(samples)

    one, buckets, together = seconds(1, 2**40), seconds(100, 1), seconds(100, 2**40)
    return {"step": one, "bucket": (buckets - together) / 99, "variable": (together - one) / 99}


# Tables.


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Each measurement as Markdown, a column for each number of ranks."""
    jobs = results["jobs"]
    found = results["facts"]
    load, versions = (f"{found[f'load {when}'][0]:.1f}" for when in ("before", "after")), found["versions"].items()
    libraries = ", ".join(f"{name} {number}" for name, number in versions)
    yield f"{found['processor']}, {found['cores']} cores, {found['date']}, load {' to '.join(load)}; {libraries}."
    ranks = [f"{job['ranks']} rank{'s' * (job['ranks'] > 1)}" for job in jobs]
    for kind in ("steps, large", "steps, many", "training, large", "training, many", "stages", "overlap"):
        rows = [[name, *(duration(job[kind][name]) for job in jobs)] for name in jobs[0][kind]]
        if kind == "steps, large":
            rows.append(["bytes that cross, a rank", *(f"{crossing(job) / 1e6:.0f} MB" for job in jobs)])
            rows.append([f"{OURS}, GB/s", *(f"{crossing(job) / job[kind][OURS] / 1e9:.2f}" for job in jobs)])
        if kind.startswith("training"):
            rows += [
                [f"{name}, times ours", *(f"{job[kind][name] / job[kind][OURS]:.2f}" for job in jobs)]
                for name in list(jobs[0][kind])[1:]
            ]
        yield markdown((kind, *ranks), rows)
    rows = [
        [
            name,
            *(f"{held / 1e6:.1f} MB, {held / formula:.3f}" for held, formula in (job["memory"][name] for job in jobs)),
        ]
        for name in jobs[0]["memory"]
    ]
    yield markdown(("memory, of the formula", *ranks), rows)
    yield markdown(("python", *jobs[0]["python"]), [["of one rank", *map(duration, jobs[0]["python"].values())]])


def crossing(job: dict[str, Any]) -> float:
    """Bytes that a rank sends in a step, and receives: 2 (W-1)/W of the parameters."""
    ranks, elements = job["ranks"], job["elements"]
    return float(2 * (ranks - 1) / ranks * 4 * elements)


# Larger machines, on paper.


@dataclass(frozen=True)
class Machine:
    """Nodes of eight H100 SXM, each GPU with a network card of its own. Seconds, bytes, bytes a second.

    Attributes:
        memory: NVIDIA's data sheet of the H100 SXM.
        used: of `memory`, by copies and updates: the goal of this project on GPUs, which nobody has measured.
        held: memory of a GPU.
        nvlink: in each direction. 900 GB/s in both, by the data sheet; of these 80 %.
        card: of a network card of 400 Gbit/s; what to expect of it by NCCL's maintainers, nccl-tests issue 290.
        base, near, far: how long NCCL's ring takes to begin, and for each step within and between nodes: the table
            hwLat of NCCL's src/graph/tuning.cc, protocol Simple.
        python: of a bucket, on the host; measured here.
    """

    memory: float = 3.35e12
    used: float = 0.9
    held: float = 80e9
    node: int = 8
    nvlink: float = 0.8 * 450e9
    card: float = 47e9
    base: float = 8.4e-6
    near: float = 3.4e-6
    far: float = 9.6e-6
    python: float = 40e-6

    def ring(self, nbytes: float, gpus: int, operations: int) -> tuple[float, float]:
        """Seconds of bytes and of latency, of reduce-scatters or all-gathers of so many bytes together."""
        nodes = -(-gpus // self.node)
        rate = self.nvlink if nodes == 1 else min(self.nvlink, self.node * self.card)
        latency = self.base + (gpus - nodes) * self.near + (nodes - 1) * self.far
        return nbytes * (gpus - 1) / gpus / rate, operations * latency

    def all_to_all(self, nbytes: float, gpus: int, operations: int) -> tuple[float, float]:
        """The same of all-to-alls, to which every GPU has its own card alone (nccl-tests issue 267)."""
        near = min(gpus, self.node)
        to_near, to_far = nbytes * (near - 1) / gpus / self.nvlink, nbytes * (gpus - near) / gpus / self.card
        return max(to_near, to_far), operations * (self.base + (self.far if gpus > near else self.near))


@dataclass(frozen=True)
class Model:
    """A model that is trained by `ShardedAdam`; bytes are those of one parameter.

    Attributes:
        name: what it is called.
        parameters: how many.
        width: of the parameter, and of its gradient.
        slots: of its slots and its master.
        direct: whether gradients go by all-to-all and are added by us: numbers of 16 bits, or deterministic=True.
    """

    name: str
    parameters: float
    width: int
    slots: int
    direct: bool


MODELS = (
    Model("1.5 G float32", 1.5e9, 4, 8, direct=False),
    Model("1.5 G float32, deterministic", 1.5e9, 4, 8, direct=True),
    Model("7 G bfloat16, masters", 7e9, 2, 12, direct=True),
)
MODEL_HEADER = (
    "model", "GPUs", "memory a GPU", "copies, update", "gradients", "parameters", "latency, 32 MiB", "latency, 1 GiB",
    "step, 1 GiB", "tokens a GPU", "limit",
)  # fmt: skip


def model(machine: Machine = Machine(), gpus: Sequence[int] = (8, 64, 256, 1024)) -> Iterator[tuple[str, ...]]:
    """A row for each model and number of GPUs.

    "step" is what follows when nothing overlaps. "tokens a GPU" is how many make a backward pass as long as that, 4
    operations for each parameter and token at 400 T operations a second (40 % of the data sheet's dense bfloat16).
    """
    for each in MODELS:
        for count in gpus:
            nbytes, share = each.parameters * each.width, each.parameters / count
            held = 3 * nbytes + share * (each.slots + 4)  # with the gradients of the backward pass
            # Gradients are copied into buckets, and added where we add; slots, sums and parameters of a share updated.
            moved = 2 * nbytes + each.direct * (nbytes + 4 * share) + share * (2 * each.slots + 4 + each.width)
            local = moved / (machine.used * machine.memory)
            exchange = machine.all_to_all if each.direct else machine.ring
            latencies = []
            for bucket in (32 * MIB, GIB):
                operations = -(-int(nbytes) // bucket)
                gradients, waits = exchange(nbytes, count, operations)
                parameters, more = machine.ring(nbytes, count, operations)
                latencies.append(waits + more + operations * machine.python)
            whole = local + gradients + parameters + latencies[1]
            limits = {
                "memory of the GPU": local,
                "a network card of each" if each.direct and count > machine.node else "gradients' way": gradients,
                "parameters' way": parameters,
                "latency of rings": latencies[1],
            }
            limit = max(limits, key=lambda name: limits[name])
            yield (
                each.name,
                str(count),
                f"{held / 1e9:.1f} GB{'' if held < machine.held else ', too much'}",
                *map(duration, (local, gradients, parameters, *latencies, whole)),
                f"{whole * 400e12 / (4 * each.parameters):.0f}",
                limit,
            )


if __name__ == "__main__":
    main()
