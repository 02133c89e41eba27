"""`gpu-adam inspect` and `gpu-adam convert`: display only.

Lines are printed as they are, for a model may have a hundred thousand variables and rich takes a millisecond for each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gpu_adam.files.contents import File, read, summary_of
from gpu_adam.files.differences import difference_of
from gpu_adam.state import checkpoint


def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint: a file, or a directory of several ranks.")],
    other: Annotated[Path | None, typer.Argument(help="Another one, to compare it with.")] = None,
) -> None:
    """Print what is in a checkpoint, or how two differ: exit status 1 where they do."""
    if other is None:
        _print(_contents(read(file)))
        return
    one, another = read(file), read(other)
    lines = [*_other_notes(one, another), *_other_arrays(one, another)]
    _print(lines or [f"The {len(one.arrays)} arrays are equal, bit for bit, and so are the notes."])
    raise typer.Exit(1 if lines else 0)


def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of any version, or a directory.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .safetensors, or .npz for all other suffixes.")],
) -> None:
    """Write a checkpoint in another container, in today's version of the format, or as one file."""
    found = read(source)
    checkpoint.write(target, found.arrays, found.note)
    _print([f"{target}: {len(found.arrays)} arrays, sha256 {read(target).digest}"])


def _contents(file: File) -> Iterator[str]:
    yield from _columns(
        [
            ["version", str(file.version)],
            *([["sha256", file.digest]] if file.digest else []),
            *([name, value] for name, value in _flat(file.note)),
        ]
    )
    yield ""
    rows = [["array", "dtype", "shape", "norm", "finite"]]
    for name, array in file.arrays.items():
        found = summary_of(array)
        shape, finite = str(list(found.shape)), f"{found.finite} of {found.size}"
        rows.append([_shown(name), found.dtype, shape, f"{found.norm:.6g}", finite])
    yield from _columns(rows)


def _other_notes(one: File, other: File) -> Iterator[str]:
    notes, others = dict(_flat(one.note)), dict(_flat(other.note))
    for name in dict.fromkeys([*notes, *others]):
        if notes.get(name) != others.get(name):
            yield f"{name}: {notes.get(name, 'nothing')} and {others.get(name, 'nothing')}"


def _other_arrays(one: File, other: File) -> Iterator[str]:
    for name in dict.fromkeys([*one.arrays, *other.arrays]):
        array, another = one.arrays.get(name), other.arrays.get(name)
        if array is None or another is None:
            yield f"{_shown(name)}: only in {(one if another is None else other).path}"
        elif (array.dtype, array.shape) != (another.dtype, another.shape):
            kinds = " and ".join(f"{found.dtype} {list(found.shape)}" for found in (array, another))
            yield f"{_shown(name)}: {kinds}"
        elif (found := difference_of(array, another)) is not None:
            one_value, other_value = found.values
            yield (
                f"{_shown(name)}: {found.differing} of {array.size} elements differ, at first {list(found.first)}: "
                f"{one_value!s} and {other_value!s}, {found.ulp:.0f} ulp; largest {found.largest_ulp:.0f} ulp"
            )


def _flat(note: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The numbers and texts of a note with their names, those of tables as "config.learning_rate"."""
    for name, value in note.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield _shown(f"{prefix}{name}"), json.dumps(value)


def _shown(name: str) -> str:
    """A name from a file, which could hold what a terminal obeys."""
    return name if name.isprintable() else ascii(name)


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _print(lines: Iterable[str]) -> None:
    typer.echo("\n".join(lines))
