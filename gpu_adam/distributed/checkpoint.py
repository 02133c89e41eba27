"""Checkpoints of several ranks: a directory with a file for each rank, or one file that a plain Adam loads.

    meta.json                                   what there is, and in which file each piece of it: the manifest
    shard-000007-5be1c0de-00002-of-00004.npz    generation 7: what rank 2 of 4 owned

README.md has the format. A save goes through these stages, and all ranks go from one to the next, or none does:

    rank 0 chooses a name for the save that no other has: the next generation, and a number drawn by lot
    every rank writes its file, beside those of the last save
    rank 0 reads the manifests of all files, and replaces meta.json
    rank 0 removes all other files of ranks

So meta.json tells at every moment of files that are all there, which nobody writes any more: not even a process that
outlives its killed job, whose files have other names.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import queue
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.communicators import Communicator
from gpu_adam.distributed.agreement import gathered, together
from gpu_adam.distributed.layout import Piece
from gpu_adam.distributed.pending_shards import PendingShards, Told
from gpu_adam.distributed.shards import Shard
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, DistributedError
from gpu_adam.kernels import dtype_named
from gpu_adam.state import atomic_file, checkpoint, manifest, saving
from gpu_adam.state.adam_state import VALUE, AdamState, unique_names
from gpu_adam.state.atomic_file import PathOrFile
from gpu_adam.state.manifest import Manifest
from gpu_adam.variables import Variable

SHARDED = "sharded"
"""What the note of a directory calls the table of its files."""

_KIND = "Adam shard"  # of the file of one rank, which no optimizer loads by itself
_FILE = re.compile(r"shard-(\d{6,})-[0-9a-f]{8}-\d{5,}-of-\d{5,}\.npz")
_PIECE = re.compile(r"(.*)\[(\d+):(\d+)\]", re.DOTALL)
_COPY = "restore the directory from a copy, or load another checkpoint"

SECONDS = 600.0
"""How long rank 0's thread looks for the files of other ranks once its own is written."""

Range = tuple[int, int]
"""Elements of an array in C order: the first one, and the one after the last."""


class _Part(NamedTuple):
    """Consecutive elements of an array, and where they are: an array of a file."""

    begin: int
    end: int
    file: PathOrFile
    member: str


class Contents(NamedTuple):
    """What a checkpoint holds, in one file or several.

    Attributes:
        title: its name, for messages.
        said: its manifest.
        note: of the whole.
        kinds: the dtype and the shape of each array, as a manifest has them: "float32 [3, 2]".
        digests: of each file that has arrays.
        parts: for each array the pieces that files have of it, in order.
    """

    title: str
    said: Manifest
    note: dict[str, Any]
    kinds: dict[str, str]
    digests: dict[PathOrFile, str]
    parts: dict[str, list[_Part]]

    def read(self, ranges: Mapping[str, Range]) -> dict[str, np.ndarray]:
        """Elements of arrays, one-dimensional, by the arrays' names.

        Of an `.npz` file nothing is read but its directory, its manifest, and members that have some of the elements;
        files without any are not opened.

        Raises:
            CheckpointError: a file is missing, damaged, or of another save; elements that no file has.
        """
        found: dict[str, np.ndarray] = {}
        wanted: dict[PathOrFile, list[tuple[str, _Part]]] = {}
        for name, (begin, end) in ranges.items():
            position = begin
            for part in self.parts[name]:
                if part.begin < end and begin < part.end:
                    wanted.setdefault(part.file, []).append((name, part))
                    position = part.end if part.begin <= position else -1
            if position < end:
                got = f"not all of the elements {begin} to {end} of {name!r}"
                raise CheckpointError(self.title, "must have all pieces of its arrays", got, _COPY)
            if begin == end:
                found[name] = self._room(name, 0)
        for file, parts in wanted.items():
            arrays = self._arrays(file, {part.member for _, part in parts})
            with checkpoint.naming(atomic_file.name_of(file)):
                for name, part in parts:
                    begin, end = ranges[name]
                    source = arrays.pop(part.member).reshape(-1)
                    if (part.begin, part.end) == (begin, end):
                        found[name] = source
                        continue
                    if name not in found:
                        found[name] = self._room(name, end - begin)
                    first, last = max(begin, part.begin), min(end, part.end)
                    found[name][first - begin : last - begin] = source[first - part.begin : last - part.begin]
        return found

    def _room(self, name: str, size: int) -> np.ndarray:
        """Memory for so many elements of an array."""
        return np.empty(size, dtype_named(self.kinds[name].partition(" ")[0]))

    def _arrays(self, file: PathOrFile, members: set[str]) -> dict[str, np.ndarray]:
        title = atomic_file.name_of(file)
        try:
            said, arrays = checkpoint.read_all(file, members)
        except FileNotFoundError as error:
            rule = f"must be there, for {manifest.NAME} tells of it"
            raise CheckpointError(title, rule, "no such file", _COPY) from error
        if said.digest != self.digests[file]:
            rule = f"must have the sha256 that {manifest.NAME} tells, {self.digests[file][:12]}..."
            got = f"{said.digest[:12]}... of generation {said.meta.get('generation')}"
            raise CheckpointError(title, rule, got, _COPY)
        return arrays


def contents_of(path: PathOrFile) -> Contents:
    """What is in a directory that a `ShardedAdam` saved to, or in one file.

    Args:
        path: the directory, or a file of version 2, of an `Adam` say.

    Raises:
        FileNotFoundError: there is no such file, or no finished save in the directory.
        CheckpointError: no checkpoint, a damaged manifest, or a file of version 1.
    """
    title = atomic_file.name_of(path)
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        said = _read_manifest(path)
        with checkpoint.naming(title):
            return _of_directory(title, path, said)
    said, _ = checkpoint.read_all(path, ())
    if said.version == 1:
        remedy = 'convert it first, by "gpu-adam convert FILE OTHER"'
        raise CheckpointError(title, "must have version 2 for several ranks", said.version, remedy)
    kinds = {name: manifest.kind_in(entry) for name, entry in said.arrays.items()}
    parts = {name: [_Part(0, _size(kind), path, name)] for name, kind in kinds.items()}
    return Contents(title, said, said.meta, kinds, {path: said.digest}, parts)


def read_all(path: PathOrFile) -> tuple[Manifest, dict[str, np.ndarray], dict[str, Any]]:
    """The manifest of a directory, all arrays in one piece each, and the note that they have as one file.

    Raises:
        As `contents_of` and `Contents.read`.
    """
    contents = contents_of(path)
    flat = contents.read({name: (0, _size(kind)) for name, kind in contents.kinds.items()})
    arrays = {name: flat[name].reshape(_shape(kind)) for name, kind in contents.kinds.items()}
    return contents.said, arrays, contents.note


class Spec:
    """What an array is, without its elements.

    Args:
        dtype: of the array.
        shape: of the array.

    Attributes:
        dtype: as above.
        shape: as above.
        size: how many elements.
        kind: dtype and shape as a manifest has them: "float32 [3, 2]".
    """

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.size = dtype, shape, math.prod(shape)
        self.kind = f"{dtype.name} {list(shape)}"


def titles_of(variables: Sequence[Variable], shards: Iterable[Shard], rank: int) -> dict[Variable, str]:
    """For what a rank owns of variables, the names that these have in files: a name of its own for each variable."""
    names = unique_names([variable.name for variable in variables])
    return {variable: names[piece.variable] for piece, variable in _owned(shards, rank)}


class RankFiles:
    """The checkpoints of an optimizer on several ranks. Every rank makes the same calls.

    Args:
        communicator: of the ranks.
        state: of what this rank owns, with its `titles`.
        variables: all of the optimizer, by number.
        shards: what lies where.
    """

    def __init__(
        self, communicator: Communicator, state: AdamState, variables: Sequence[Variable], shards: Sequence[Shard]
    ) -> None:
        self._communicator, self._state, self._shards = communicator, state, shards
        self._variables = dict(zip(unique_names([each.name for each in variables]), variables, strict=True))
        self._ranges = {
            state.titles[variable]: (piece.begin, piece.begin + piece.size)
            for piece, variable in _owned(shards, communicator.rank)
        }

    # Saving.

    def save(
        self, path: PathOrFile, note: Callable[[], dict[str, Any]], *, variables: bool, asynchronous: bool
    ) -> PendingShards | None:
        """Write a generation of files into a directory.

        Args:
            path: the directory, the same one for all ranks; it is made where it does not exist.
            note: gives this rank's note.
            variables: whether to write the variables too.
            asynchronous: whether threads write, and what tells when they have is returned.

        Raises:
            As `together`: on all ranks where one fails. Then the directory is as it was, but for files of which
            meta.json does not tell; unless meta.json could not be synced: then it is the old one or the new one.
        """
        communicator = self._communicator
        rank, ranks, directory = communicator.rank, communicator.size, _directory(path)
        own_note, turn = together(communicator, lambda: (note(), _Turn("", "") if rank else _next_turn(directory)))
        whole, (label, *_) = self._joined(own_note), gathered(communicator, turn.label)
        files = [_file_name(label, rank, ranks) for rank in range(ranks)]
        read = together(communicator, lambda: self._pieces(variables=variables, lasting=asynchronous))
        shapes = {name: list(variable.shape) for name, variable in self._variables.items()}

        def write() -> None:
            atomic_file.make_directory(directory)  # who has looked for it before rank 0 made it might not see it yet
            about = {"kind": _KIND, "generation": _generation(label), "rank": rank, "ranks": ranks}
            checkpoint.write(os.path.join(directory, files[rank]), read(), about)

        def commit() -> None:
            if rank == 0:
                _commit(directory, turn, files, whole, shapes)

        def commit_when_all_are_there(told: Told) -> None:
            if rank == 0 and _are_there(directory, files, told):
                commit()

        if asynchronous:
            return PendingShards(communicator, write, commit_when_all_are_there)
        together(communicator, write)
        together(communicator, commit)
        return None

    def gather(
        self, path: PathOrFile, note: Callable[[], dict[str, Any]], *, variables: bool, asynchronous: bool
    ) -> PendingShards | None:
        """Write one file, as `Adam.save` does.

        Rank 0 takes host memory for all arrays, and device memory for one bucket of each of them at a time; the other
        ranks copy what they own of a bucket.

        Args:
            path: the file, which rank 0 writes.
            note: gives this rank's note.
            variables: whether to write the variables too.
            asynchronous: as of `save`.
        """
        communicator = self._communicator
        whole = self._joined(together(communicator, note))
        specs, target = self._specs(variables=variables), saving.lasting_path(path)
        together(communicator, lambda: checkpoint.check(target, specs))
        arrays = self._gathered(specs)

        def write() -> None:
            if communicator.rank == 0:
                checkpoint.write(target, arrays, whole)

        if asynchronous:
            return PendingShards(communicator, write, lambda told: None)
        together(communicator, write)
        return None

    def _joined(self, note: dict[str, Any]) -> dict[str, Any]:
        """This rank's note, with what the others' say of the variables that they own."""
        key, listed = "groups", "never_decayed"
        texts = gathered(self._communicator, json.dumps([note[key], note[listed]]))
        groups: dict[str, Any] = {}
        never_decayed: set[str] = set()
        for groups_there, listed_there in map(json.loads, texts):
            groups |= groups_there
            never_decayed.update(listed_there)
        ordered = {name: groups[name] for name in self._variables if name in groups}
        return {**note, key: ordered, listed: [name for name in self._variables if name in never_decayed]}

    def _pieces(self, *, variables: bool, lasting: bool) -> Callable[[], dict[str, np.ndarray]]:
        """A function that gives what this rank writes, by the names of arrays and pieces.

        Args:
            variables: whether the variables are among it.
            lasting: whether they may change before the function is called.
        """
        read = saving.reading(self._state.named(variables=variables), lasting=lasting)

        def pieces() -> dict[str, np.ndarray]:
            found: dict[str, np.ndarray] = {}
            for name, array in read().items():
                if (place := self._range_of(name)) is not None:
                    if array.size:
                        found[_piece_name(name, place)] = array.reshape(-1)
                elif self._communicator.rank == 0:  # all ranks have the same numbers
                    found[name] = array
            return found | unowned

        unowned: dict[str, np.ndarray] = {}
        if self._communicator.rank == 0:  # nobody owns an element of an empty variable
            for name, spec in self._specs(variables=variables).items():
                if spec.size == 0:
                    unowned[_piece_name(name, (0, 0))] = np.empty(0, spec.dtype)
        return pieces

    def _range_of(self, name: str) -> Range | None:
        """What this rank owns of the array of a variable; None for another array, which it has as a whole."""
        variable, slash, _ = name.rpartition("/")
        return self._ranges[variable] if slash else None

    def _specs(self, *, variables: bool) -> dict[str, Spec]:
        """What the arrays of the whole state are, in the order in which one optimizer has them."""
        spec = functools.cache(Spec)  # of a hundred thousand arrays many are alike
        specs = {
            name: spec(weight.dtype, weight.shape) for name, weight in self._state.named().items() if "/" not in name
        }
        kinds: dict[str, dict[int, np.dtype]] = {name: {} for name in self._state.slots}
        for shard in self._shards:
            for slot_name, dtype in self._kinds(shard):
                for number in shard.bucket.variables:
                    kinds.setdefault(slot_name, {})[number] = dtype
        if not variables:
            kinds.pop(VALUE, None)
        for slot_name, dtypes in kinds.items():
            for number, (name, variable) in enumerate(self._variables.items()):
                if number in dtypes:
                    specs[f"{name}/{slot_name}"] = spec(dtypes[number], variable.shape)
        return specs

    def _kinds(self, shard: Shard) -> Iterator[tuple[str, np.dtype]]:
        """The arrays that each variable of a bucket has: slots and the variable, with their dtypes."""
        first = shard.pieces[0]  # every rank has one, an empty one perhaps
        yield from ((name, owned[first].dtype) for name, owned in self._state.slots.items() if first in owned)
        yield VALUE, first.dtype

    def _gathered(self, specs: Mapping[str, Spec]) -> dict[str, np.ndarray]:
        """All arrays, on rank 0; on the others none."""
        communicator, device, state = self._communicator, self._communicator.device, self._state
        is_first, names = communicator.rank == 0, list(self._variables)
        arrays: dict[str, np.ndarray] = {}
        if is_first:
            arrays = {name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()}
            arrays |= {name: weight.numpy() for name, weight in state.named().items() if "/" not in name}
        for shard in self._shards:
            pieces = shard.bucket.pieces
            sizes = [sum(piece.size for piece in each) for each in pieces]
            own = sizes[communicator.rank]
            for slot_name, dtype in self._kinds(shard):
                if f"{names[shard.bucket.variables[0]]}/{slot_name}" not in specs:
                    continue
                slots = shard.pieces if slot_name == VALUE else [state.slots[slot_name][each] for each in shard.pieces]
                sent = device.empty(own, dtype)
                sources = [slot.value.reshape(-1) for slot in slots if slot.size]
                ends = np.cumsum([0, *(source.size for source in sources)]).tolist()
                targets = [sent[begin:end] for begin, end in pairwise(ends)]
                device.copy_call(targets, sources)()
                received = device.empty(sum(sizes) if is_first else 0, dtype)
                counts = sizes if is_first else [0] * communicator.size
                to_first = [own, *[0] * (communicator.size - 1)]
                communicator.all_to_all(sent, received, to_first, counts).wait()
                flat, position = device.numpy(received), 0
                for piece in (piece for each in pieces for piece in each) if is_first else ():
                    whole = arrays[f"{names[piece.variable]}/{slot_name}"].reshape(-1)
                    whole[piece.begin : piece.begin + piece.size] = flat[position : position + piece.size]
                    position += piece.size
        return arrays

    # Loading.

    def loading(self, path: PathOrFile, *, variables: bool) -> Callable[[], None]:
        """A function that overwrites this rank's state by its part of a checkpoint, of any number of ranks.

        Until it is called nothing changes.

        Args:
            path: a directory, or one file, the same for all ranks.
            variables: whether to read the variables too.

        Raises:
            FileNotFoundError, CheckpointError: as `Adam.load`, on all ranks where one of them refuses.
        """
        digest, write = together(self._communicator, lambda: self._read(path, variables=variables))
        digests = gathered(self._communicator, digest)
        others = [rank for rank, each in enumerate(digests) if each != digests[0]]
        if others:
            rule = f"must be the same on all ranks; rank 0 has one of sha256 {digests[0][:12]}..."
            got, remedy = (
                f"{digests[others[0]][:12]}... on rank {others[0]}",
                "load from a place that all ranks see alike",
            )
            raise CheckpointError(atomic_file.name_of(path), rule, got, remedy)
        return write

    def _read(self, path: PathOrFile, *, variables: bool) -> tuple[str, Callable[[], None]]:
        state, contents = self._state, contents_of(path)
        title, specs = contents.title, self._specs(variables=variables)
        saving.check_note(title, state, contents.note)
        kinds = saving.fitting(title, state, contents.kinds, specs.keys(), variables=variables)
        for name, spec in specs.items():
            if kinds[name] != spec.kind:
                raise CheckpointError(f"{name!r} in {title}", f'must be "{spec.kind}"', kinds[name], saving.OWN)
        named = state.named(variables=variables)
        flat = contents.read({name: self._range_of(name) or (0, specs[name].size) for name in named})
        arrays = {name: flat[name].reshape(variable.shape) for name, variable in named.items()}
        return contents.said.digest, saving.restoring(title, state, (arrays, contents.note), variables=variables)


def _owned(shards: Iterable[Shard], rank: int) -> Iterator[tuple[Piece, Variable]]:
    for shard in shards:
        yield from zip(shard.bucket.pieces[rank], shard.pieces, strict=True)


# Names.


def _file_name(label: str, rank: int, ranks: int) -> str:
    return f"shard-{label}-{rank:05}-of-{ranks:05}.npz"


class _Turn(NamedTuple):
    """A save among those into a directory.

    Attributes:
        label: what its files are called by, "000007-5be1c0de": the generation, and what no other save has.
        last: the digest of the manifest that it is to replace; "" where there is no whole one.
    """

    label: str
    last: str


def _generation(label: str) -> int:
    return int(label.partition("-")[0])


def _piece_name(name: str, found: Range) -> str:
    return f"{name}[{found[0]}:{found[1]}]"


@functools.lru_cache(maxsize=4096)
def _shape(kind: str) -> tuple[int, ...]:
    return tuple(json.loads(kind.partition(" ")[2]))


def _size(kind: str) -> int:
    return math.prod(_shape(kind))


# The directory.


def _directory(path: PathOrFile) -> str:
    """The path that the argument is."""
    if not isinstance(path, (str, os.PathLike)):
        rule, got = "must be the path of a directory", type(path).__name__
        raise ArgumentTypeError("path", rule, got, "pass one, or gather=True for one file")
    return os.path.abspath(os.fspath(path))  # the working directory may be another one when a thread writes


def _read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    path = os.path.join(directory, manifest.NAME)
    with atomic_file.opened(path) as file, checkpoint.naming(path):
        return manifest.parsed(path, file.read())


def _of_directory(title: str, path: str | os.PathLike[str], said: Manifest) -> Contents:
    table = said.meta[SHARDED]
    note = {key: value for key, value in said.meta.items() if key != SHARDED}
    kinds: dict[str, str] = {}
    parts: dict[str, list[_Part]] = {}
    digests: dict[PathOrFile, str] = {}
    entries = iter(said.arrays.items())
    for name, (digest, count) in table["files"].items():
        if not _FILE.fullmatch(name):  # no name of another directory
            raise ValueError(f"a file {name!a}")
        file = os.path.join(path, name)
        digests[file] = digest
        for member, entry in islice(entries, count):
            kind = manifest.kind_in(entry)
            match = _PIECE.fullmatch(member)
            if match is None:
                kinds[member], parts[member] = kind, [_Part(0, _size(kind), file, member)]
                continue
            array, begin, end = match[1], int(match[2]), int(match[3])
            if _shape(kind) != (end - begin,):
                raise ValueError(f"{kind} for {member!a}")
            shape = table["shapes"][array.rpartition("/")[0]]
            kinds[array] = f"{kind.partition(' ')[0]} {shape}"
            parts.setdefault(array, []).append(_Part(begin, end, file, member))
    for each in parts.values():
        each.sort(key=lambda part: part.begin)
    return Contents(title, said, note, kinds, digests, parts)


def _next_turn(directory: str) -> _Turn:
    """That of a save that begins. Files of saves that were not finished go first, for the disk may be full of them."""
    if os.path.exists(directory) and not os.path.isdir(directory):
        rule, remedy = "must be a directory", "pass another name, or gather=True for one file"
        raise ArgumentValueError("path", rule, f"the file {directory}", remedy)
    atomic_file.make_directory(directory)
    digest, last = "", 0
    # Without a whole manifest nobody knows what is finished: then all files stay until there is one.
    with contextlib.suppress(FileNotFoundError, CheckpointError, KeyError, TypeError, ValueError):
        said = _read_manifest(directory)
        digest, table = said.digest, said.meta[SHARDED]
        last = int(table["generation"])
        atomic_file.sync_directory(directory)  # who wrote this meta.json may have been killed before it was durable
        _remove_others(directory, table["files"])
    generation = max([last, *_generations(directory).values()]) + 1
    return _Turn(f"{generation:06}-{os.urandom(4).hex()}", digest)


def _are_there(directory: str, files: Sequence[str], told: Told) -> bool:
    """Wait until the files of all ranks are there, or the other ranks tell that one will not come; whether they are.

    Raises:
        DistributedError: neither has happened in time.
    """
    names, begin, pause = set(files), time.monotonic(), 0.01
    while missing := names.difference(os.listdir(directory)):
        with contextlib.suppress(queue.Empty):
            return told.get(timeout=pause)
        pause = min(1.0, 2 * pause)
        if time.monotonic() - begin > SECONDS:
            rule, got = f"must have the files of all ranks {SECONDS:g} s after that of rank 0", f"no {min(missing)}"
            remedy = "look for a rank that has died, has no room or is slow, and call wait() on all ranks"
            raise DistributedError(directory, rule, got, remedy)
    return True


def _commit(
    directory: str, turn: _Turn, names: Sequence[str], note: Mapping[str, Any], shapes: Mapping[str, list[int]]
) -> None:
    """Make a save the one that is loaded, and remove the files of others."""
    entries: dict[str, str] = {}
    files: dict[str, tuple[str, int]] = {}
    for rank, name in enumerate(names):
        try:
            said, _ = checkpoint.read_all(os.path.join(directory, name), ())
        except FileNotFoundError as error:
            rule, got = "must be a directory that all ranks see", f"no file of rank {rank} seen by rank 0"
            raise ArgumentValueError("path", rule, got, "pass a directory of a shared file system") from error
        entries |= said.arrays
        files[name] = said.digest, len(said.arrays)
    table = {"generation": _generation(turn.label), "files": files, "shapes": shapes}
    text = manifest.text_of(entries, {**note, SHARDED: table})
    atomic_file.sync_directory(directory)  # the names of all files are durable before meta.json tells of them
    if _digest(directory) != turn.last:
        rule, got = f"must have the {manifest.NAME} that was there when the save began", "that of another job"
        raise CheckpointError(directory, rule, got, "let one job at a time save there")
    with atomic_file.written(os.path.join(directory, manifest.NAME)) as file:
        file.write(text.encode())
    _remove_others(directory, files)


def _digest(directory: str) -> str:
    """That of the directory's manifest; "" where there is no whole one."""
    with contextlib.suppress(FileNotFoundError, CheckpointError):
        return _read_manifest(directory).digest
    return ""


def _generations(directory: str) -> dict[str, int]:
    """The files of saves, finished or not, with their generations."""
    found = ((name, _FILE.fullmatch(name)) for name in os.listdir(directory))
    return {name: int(match[1]) for name, match in found if match}


def _remove_others(directory: str, files: Container[str]) -> None:
    """Remove the files of all saves but one, as far as the system lets us."""
    for name in _generations(directory):
        if name not in files:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(directory, name))
    atomic_file.sweep(directory, _FILE.pattern)
