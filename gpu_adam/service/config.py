"""What a service is to own: a TOML file, checked before anything is made.

    device = "host"                                   # optional: "auto", "host", "cuda" or "cuda:N"
    client_memory = 1_000_000_000                     # optional: bytes that one client may write to, at most

    [optimizer.main]
    config = {learning_rate = 0.01, amsgrad = true}   # Adam's arguments
    policy = "on_push"                                # or "all_of=2", "every=0.5"
    lost_client = "fail"                              # with all_of; or "continue"
    checkpoint = {directory = "run", every_steps = 1000, every_seconds = 60.0, keep = 3}

    [optimizer.main.variables]
    w = {shape = [784, 10], dtype = "float32"}        # zeros; or initializer = "ones", or "glorot_uniform", and a seed
    b = {initial = "b.npy"}                           # a file of numpy.save

Paths are relative to the file's directory.
"""

from __future__ import annotations

import contextlib
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.adam import Adam
from gpu_adam.devices import Device, find_device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError
from gpu_adam.rules import is_whole, one_of, shown
from gpu_adam.service.layout import KINDS
from gpu_adam.service.policies import LOSSES, Policy, policy_named
from gpu_adam.variables import as_dtype, as_shape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _glorot_uniform(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Uniform in +-sqrt(6 / (rows + columns)), as tf.keras's initializer of that name (Glorot & Bengio, 2010)."""
    rows, columns = (*shape, 1, 1)[:2] if len(shape) < 2 else (shape[-2], shape[-1])
    field = math.prod(shape[:-2])
    limit = math.sqrt(6 / max(1, field * (rows + columns)))
    return rng.uniform(-limit, limit, shape)


_INITIALIZERS: dict[str, Callable[[tuple[int, ...], np.random.Generator], np.ndarray]] = {
    "zeros": lambda shape, rng: np.zeros(shape),
    "ones": lambda shape, rng: np.ones(shape),
    "glorot_uniform": _glorot_uniform,
}
_CHECKPOINT = ("directory", "every_steps", "every_seconds", "keep")


class OptimizerConfig(NamedTuple):
    """An optimizer that a service is to own.

    Attributes:
        adam: the optimizer, without variables.
        values: each variable's first value, by name.
        policy: when pushes become steps.
        checkpoint: `CheckpointManager`'s arguments, `directory` and others; None for no checkpoints.
    """

    adam: Adam
    values: dict[str, np.ndarray]
    policy: Policy
    checkpoint: dict[str, Any] | None


class ServiceConfig(NamedTuple):
    """All that a service is to own.

    Attributes:
        device: where all of it lies.
        optimizers: by name.
        client_memory: bytes of regions that one client may have.
    """

    device: Device
    optimizers: dict[str, OptimizerConfig]
    client_memory: int


def read_config(path: Path, device: str | None = None) -> ServiceConfig:
    """Read a file.

    Args:
        path: of the file.
        device: in place of the file's.

    Raises:
        OSError: a file cannot be read.
        ArgumentTypeError, ArgumentValueError: it is no TOML, or says something that a rule forbids.
    """
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentValueError(str(path), "must be TOML", error, "correct it") from error
    _check_names(str(path), table, ("device", "client_memory", "optimizer"))
    optimizers = _table(f"{path}: optimizer", table.get("optimizer", {}))
    if not optimizers:
        raise ArgumentValueError(str(path), "must have an optimizer", "none", "add a table [optimizer.main]")
    found = {name: _optimizer(f"{path}: optimizer.{name}", entry, path.parent) for name, entry in optimizers.items()}
    directories = [each.checkpoint["directory"].resolve() for each in found.values() if each.checkpoint is not None]
    if len(set(directories)) < len(directories):
        rule, remedy = "must have a checkpoint.directory for each optimizer", "name different ones"
        raise ArgumentValueError(str(path), rule, "the same for two", remedy)
    models = sum(value.nbytes for each in found.values() for value in each.values.values())
    memory = table.get("client_memory", 4 * models + 2**26)
    if not is_whole(memory) or memory < 1:
        raise ArgumentValueError(
            f"{path}: client_memory", "must be a number of bytes >= 1", shown(memory), "correct it"
        )
    return ServiceConfig(find_device(device or table.get("device") or None), found, int(memory))


def _optimizer(where: str, given: Any, directory: Path) -> OptimizerConfig:
    table = _table(where, given)
    _check_names(where, table, ("config", "policy", "lost_client", "checkpoint", "variables"))
    with _named(f"{where}.config"):
        adam = Adam.from_config(_table("it", table.get("config", {})))
    if adam.flavour.loss_scale is not None:
        rule, remedy = "must be left out: clients do not see it", "pass grad_scale with each push, and skip_nonfinite"
        raise ArgumentValueError(f"{where}.config.loss_scale", rule, "one", remedy)
    if adam.flavour.sparse_update != "dense":
        rule = 'must be "dense": others read all rows at any time'
        raise ArgumentValueError(f"{where}.config.sparse_update", rule, adam.flavour.sparse_update, "leave it out")
    lost = one_of(f"{where}.lost_client", table.get("lost_client", LOSSES[0]), LOSSES)
    variables = _table(f"{where}.variables", table.get("variables"))
    if not variables:
        raise ArgumentValueError(f"{where}.variables", "must name one at least", "none", "add w = {shape = [3]}, say")
    return OptimizerConfig(
        adam=adam,
        values={name: _value(f"{where}.variables.{name}", entry, directory) for name, entry in variables.items()},
        policy=policy_named(f"{where}.policy", table.get("policy", "on_push"), lost),
        checkpoint=_checkpoint(f"{where}.checkpoint", table.get("checkpoint"), directory),
    )


def _value(where: str, given: Any, directory: Path) -> np.ndarray:
    value = _unchecked_value(where, _table(where, given), directory)
    if value.dtype.name not in KINDS:
        raise ArgumentValueError(where, f"must have a dtype of {', '.join(KINDS)}", value.dtype, "cast it")
    return value


def _unchecked_value(where: str, table: Mapping[str, Any], directory: Path) -> np.ndarray:
    _check_names(where, table, ("shape", "dtype", "initial", "initializer", "seed"))
    if ("initial" in table) == ("shape" in table):
        raise ArgumentValueError(where, "must have either shape or initial", sorted(table), "give one of the two")
    if "shape" in table:
        initializer = one_of(f"{where}.initializer", table.get("initializer", "zeros"), list(_INITIALIZERS))
        seed = table.get("seed", 0)
        if not is_whole(seed) or seed < 0:
            raise ArgumentValueError(f"{where}.seed", "must be a whole number >= 0", shown(seed), "correct it")
        # The name too, so that variables of one seed differ.
        rng = np.random.default_rng((seed, zlib.crc32(where.rpartition(".")[2].encode())))
        with _named(where):
            value = _INITIALIZERS[initializer](as_shape(table["shape"]), rng)
            return value.astype(as_dtype(table.get("dtype", "float32")))
    if not isinstance(table["initial"], str):
        got = shown(table["initial"])
        raise ArgumentTypeError(f"{where}.initial", "must be the path of a file", got, "pass a text")
    path = directory / table["initial"]
    try:
        with open(path, "rb") as file:
            value = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArgumentValueError(f"{where}.initial", "must be a file of numpy.save", error, "save an array") from error
    with _named(where):
        return value.astype(as_dtype(table["dtype"])) if "dtype" in table else value


def _checkpoint(where: str, given: Any, directory: Path) -> dict[str, Any] | None:
    if given is None:
        return None
    table = dict(_table(where, given))
    _check_names(where, table, _CHECKPOINT)
    if not isinstance(table.get("directory"), str):
        got = shown(table.get("directory"))
        raise ArgumentTypeError(f"{where}.directory", "must be the path of a directory", got, "pass a text")
    return {**table, "directory": directory / table["directory"]}


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """A block whose errors say where in the file they come from."""
    try:
        yield
    except GpuAdamError as error:
        raise type(error)(f"{where}: {error.argument}", error.rule, error.got, error.remedy) from error
    except (KeyError, MemoryError, OverflowError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise ArgumentValueError(where, "must be what this machine can make", got, "correct it") from error


def _table(where: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        got = "nothing" if given is None else shown(given)
        raise ArgumentTypeError(where, "must be a table", got, "write it as in gpu_adam/service/README.md")
    return given


def _check_names(where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in table:
        if name not in known:
            raise ArgumentValueError(where, f"must have no other entries than {', '.join(known)}", name, "correct it")
