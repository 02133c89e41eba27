"""The table of what is seen without a GPU: how it is compared and written; one kernel compiled and counted."""

import json
import shutil
from pathlib import Path

import pytest

from gpu_adam import kernels

pytest.importorskip("cupy", reason="the extra cuda13 brings it")
static = pytest.importorskip("profiling.static", reason="needs CuPy and NVRTC: the extra cuda13")
callgrind = pytest.importorskip("profiling.callgrind")

VERSION = "NVRTC {}.{}".format(*static.nvrtc.getVersion())
BEFORE = {"a": {"registers": 40, "spilled": 0}, "gone": {}}
KERNELS = [
    (kernels.UpdateRule(), "", "4 LDG.16, 3 STG.16", 28),
    (kernels.ACCUMULATION, " accumulate", "2 LDG.16, 1 STG.16", 12),
]
AFTER = {"a": {"registers": 41, "spilled": 0}, "b": {}}


def test_differences_name_what_changed() -> None:
    lines = list(static.differences(BEFORE, AFTER, complete=True))
    assert lines == ["a: registers 40 -> 41", "b: new", "gone: gone"]
    assert "gone: gone" not in list(static.differences(BEFORE, AFTER, complete=False))


def test_a_row_is_a_line() -> None:
    text = static.dumped({"nvrtc": "x", "gpu": AFTER})
    assert json.loads(text) == {"nvrtc": "x", "gpu": AFTER}
    assert [line for line in text.splitlines() if '"registers"' in line] == ['  "a": {"registers": 41, "spilled": 0},']


def test_main_judges_only_the_same_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(static, "TABLE", tmp_path / "static.json")
    now = {"nvrtc": "1", "compiler": "1", "sources": {}, "gpu": AFTER, "host": {}}
    monkeypatch.setattr(static, "table", lambda before, only: now)
    assert static.main(["--update"]) == 0
    assert static.main([]) == 0
    now["gpu"] = BEFORE
    assert static.main([]) == 1
    now["nvrtc"] = "2"
    assert static.main([]) == 0
    now["sources"] = {"a.cu": {"text": "changed"}}
    assert static.main([]) == 1


def test_every_source_has_its_own_description() -> None:
    sources = dict.fromkeys([*kernels.variants(), kernels.dense("float32", kernels.UpdateRule(), staged=True).source])
    described = {(source.file, callgrind.description(source)) for source in sources}
    assert len(described) == len(sources)


@pytest.mark.parametrize(("rule", "words", "loop", "moved"), KERNELS)
def test_a_kernel_is_compiled_and_read(rule: kernels.UpdateRule, words: str, loop: str, moved: int) -> None:
    if shutil.which("cuobjdump") is None:
        pytest.importorskip("nvidia.cu13", reason="the extra dev brings the disassemblers")
    source = kernels.dense("float32", rule).source
    ((name, row),) = static.gpu_rows((source, 90))
    assert name == f"dense float32{words} sm_90"
    assert row["spilled"] == 0
    assert row["loop"] == loop
    assert row["bytes per element"] == moved
    recorded = json.loads(static.TABLE.read_text())
    if recorded["nvrtc"] == VERSION:
        assert recorded["gpu"][name] == row


def test_only_what_changed_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the same text by the same compilers are taken over, whatever they hold."""
    only = kernels.dense("float32", kernels.ACCUMULATION).source
    monkeypatch.setattr(static.sass, "ARCHITECTURES", (90,))
    monkeypatch.setattr(static.kernels, "variants", lambda: [only])
    made_up, host = {"dense float32 accumulate sm_90": {"registers": -1}}, "dense float32 accumulate"
    monkeypatch.setattr(static.callgrind, "rows", lambda chosen: {name: {"counted": 1} for name in chosen})
    tools = {"nvrtc": VERSION, "compiler": callgrind.version()}
    sources = {"dense.cu float32 accumulate": static.digest(only)}
    before = {**tools, "sources": sources, "gpu": made_up, "host": {host: {"counted": 0}}}
    assert static.table(before, "float32 accumulate") == before
    for change in ({"nvrtc": "another"}, {"sources": {"dense.cu float32 accumulate": {"text": "another"}}}):
        assert static.table({**before, **change}, "float32 accumulate")["gpu"] != made_up
    assert static.table({**before, "compiler": "another"}, "float32 accumulate")["host"] == {host: {"counted": 1}}


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_a_host_kernel_is_counted() -> None:
    count = callgrind.instructions(kernels.dense("float32", kernels.UpdateRule()))
    assert count % 2 in (0, 1)
    assert count > callgrind.CHUNKS * kernels.CHUNK  # eight elements to an instruction, and more than eight of them
