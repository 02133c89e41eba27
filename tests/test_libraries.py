"""The cache of compiled kernels: shared, cut short, damaged, planted; and directories that cannot be one."""

import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import processes
import pytest
from processes import STEP, compiler_script

from gpu_adam.devices import compiler, libraries
from gpu_adam.devices.libraries import directory

pytestmark = pytest.mark.thorough

WARNED = "RuntimeWarning: the kernel cache must be a directory that only you can write to, and from which code may run"
WARNED_STEP = "import warnings\nwarnings.simplefilter('always')\n" + STEP
NOBODY = 65534


class Warm(NamedTuple):
    """A cache that one process has filled."""

    cache: Path
    printed: str
    log: Path
    cxx: Path

    def copy(self, folder: Path) -> Path:
        """A cache with the same files."""
        return Path(shutil.copytree(self.cache, folder / "cache"))

    def calls(self) -> list[str]:
        """What its compiler was asked to compile since the last look."""
        found = [line for line in self.log.read_text().splitlines() if "kernel.cpp" in line]
        self.log.write_text("")
        return found


@pytest.fixture
def warm(filled: Warm) -> Warm:
    """The one cache of this file, and a log that begins with the test."""
    filled.calls()
    return filled


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Warm:
    folder = tmp_path_factory.mktemp("warm")
    cxx = compiler_script(folder, f'echo "$@" >> {folder}/log; compile "$@"')
    warm = Warm(folder / "cache", processes.run(STEP, GPU_ADAM_CACHE=folder / "cache", CXX=cxx), folder / "log", cxx)
    assert len(warm.calls()) == len(names(warm.cache)) >= 3
    return warm


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of each file."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def warned(text: str) -> tuple[str, str]:
    """The reason of the one warning, and what was printed besides."""
    assert text.count(WARNED) == 1, text
    reason = text.partition(f"{WARNED} (got ")[2].partition("); set GPU_ADAM_CACHE to one; a temporary directory takes")
    return reason[0], text.splitlines()[-1]


# Where it is.


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU_ADAM_CACHE, else gpu_adam in XDG_CACHE_HOME, else in ~/.cache; what a shell would have expanded, expanded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    for given, place in (("a", "a"), (".", "."), ("a/../d", "d"), ("~/x", "c/x"), (str(tmp_path / "é "), "é ")):
        monkeypatch.setenv("GPU_ADAM_CACHE", given)
        assert directory() == tmp_path / place
        assert directory().is_dir()
    monkeypatch.setenv("GPU_ADAM_CACHE", "")
    assert directory() == tmp_path / "b" / "gpu_adam"
    monkeypatch.delenv("GPU_ADAM_CACHE")
    assert directory() == tmp_path / "b" / "gpu_adam"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert directory() == tmp_path / "c" / ".cache" / "gpu_adam"
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.setenv("GPU_ADAM_CACHE", str(tmp_path / "link" / "e"))
    assert directory() == tmp_path / "a" / "e"


def test_the_current_directory_as_cache(warm: Warm, tmp_path: Path) -> None:
    """A library's name alone would be looked for where the system's libraries are."""
    code = f"import os\nos.chdir({str(tmp_path)!r})\n{WARNED_STEP}"
    for _ in range(2):
        assert processes.run(code, GPU_ADAM_CACHE=".", CXX=warm.cxx) == warm.printed
    assert len(warm.calls()) == 3
    assert len(names(tmp_path)) == 3


# What is in it.


def test_a_second_process_compiles_nothing(warm: Warm) -> None:
    before = contents(warm.cache)
    assert all(name.startswith("host-") and name.endswith(".so") for name in before)
    assert processes.run(STEP, GPU_ADAM_CACHE=warm.cache, CXX=warm.cxx) == warm.printed
    assert warm.calls() == []
    assert contents(warm.cache) == before


def test_processes_that_start_together(tmp_path: Path, warm: Warm) -> None:
    """Each finds nothing or a whole library, and none leaves anything behind."""
    together = [processes.start(STEP, GPU_ADAM_CACHE=tmp_path / "cache", CXX=warm.cxx) for _ in range(2)]
    assert [processes.output_of(process) for process in together] == [warm.printed] * 2
    assert names(tmp_path / "cache") == names(warm.cache)


def test_another_compiler_has_files_of_its_own(tmp_path: Path, warm: Warm) -> None:
    """Another command, another version: what one has compiled is not taken for the other's."""
    cache = warm.copy(tmp_path)
    cxx = compiler_script(tmp_path, 'if [ "$1" = --version ]; then echo another 1.0; else compile "$@"; fi')
    assert processes.run(STEP, GPU_ADAM_CACHE=cache, CXX=cxx) == warm.printed
    assert len(names(cache)) == 2 * len(names(warm.cache))


def cut(content: bytes) -> bytes:
    return content[:4096]


DAMAGES: list[Callable[[bytes], bytes]] = [cut, lambda content: b"", lambda content: b"garbage", lambda c: c + b"\0"]


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut", "empty", "garbage", "longer"])
def test_damaged_files_are_built_again_once(tmp_path: Path, warm: Warm, damage: Callable[[bytes], bytes]) -> None:
    """What a power failure leaves ended the process at every start."""
    cache = warm.copy(tmp_path)
    for path in cache.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    assert processes.run(WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx) == warm.printed
    assert len(warm.calls()) == len(names(warm.cache))
    assert processes.run(WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx) == warm.printed
    assert warm.calls() == []
    assert names(cache) == names(warm.cache)


def test_no_damage_gets_through(tmp_path: Path, warm: Warm) -> None:
    """Eight random bytes, any length, one file in another's place: found, and the file deleted."""
    cache, rng = warm.copy(tmp_path), random.Random(0)
    whole = {path: path.read_bytes() for path in cache.iterdir()}
    paths = sorted(whole)
    for path in paths:
        kept = libraries._whole(path)
        assert kept is not None
        assert whole[path].startswith(kept)
    for turn in range(300):
        path, other = rng.sample(paths, 2)
        content = bytearray(whole[path])
        if turn % 3 == 0:
            for place in rng.sample(range(len(content)), 8):
                content[place] ^= rng.randrange(1, 256)
        elif turn % 3 == 1:
            del content[rng.randrange(len(content)) :]
        else:
            content[:] = whole[other]
        path.write_bytes(content)
        assert libraries._whole(path) is None
        assert not path.exists()


def test_a_library_for_another_system_is_built_again(tmp_path: Path, warm: Warm) -> None:
    """Whole, and yet it does not load, as one for a newer C library."""
    cache = warm.copy(tmp_path)
    for path in cache.iterdir():
        path.write_bytes(b"other" + libraries._digest(path.name, b"other"))
    assert processes.run(WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx) == warm.printed
    assert len(warm.calls()) == len(names(warm.cache))
    assert processes.run(WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx) == warm.printed
    assert warm.calls() == []


def test_a_library_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int, int]] = []

    def record(what: str, status: os.stat_result) -> None:
        events.append((what, status.st_ino, status.st_size))

    def recorded_replace(path: Path, target: Path) -> Path:
        record("rename", path.stat())
        return replace(path, target)

    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: record("fsync", os.fstat(descriptor)))
    monkeypatch.setattr(Path, "replace", recorded_replace)
    libraries._keep(b"library", tmp_path / "host-1.so", tmp_path)
    status = (tmp_path / "host-1.so").stat()
    assert events == [("fsync", status.st_ino, status.st_size), ("rename", status.st_ino, status.st_size)]
    assert libraries._whole(tmp_path / "host-1.so") == b"library"


# Who may write to it.


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_a_umask_opens_nothing(tmp_path: Path, warm: Warm, umask: int) -> None:
    """What is made is closed to others' writing, from the first directory to the last file, also the compiler's."""
    home, seen = tmp_path / "home", tmp_path / "seen"
    home.mkdir()
    cxx = compiler_script(tmp_path, f'umask >> {seen}; compile "$@"')
    code = f"import os\nos.umask({umask})\n{WARNED_STEP}"
    for _ in range(2):
        text = processes.run(code, GPU_ADAM_CACHE=None, XDG_CACHE_HOME=home / "new" / "cache", CXX=cxx)
        assert text == warm.printed
    made = [path for path in home.rglob("*") if path.stat().st_mode & 0o022]
    assert made == []
    assert len(list(home.rglob("*"))) == 3 + len(names(warm.cache))
    assert set(seen.read_text().split()) == {"0077"}


EVIL = """
#include <stdio.h>
__attribute__((constructor)) static void run() { puts("EVIL"); fflush(stdout); }
"""


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A library that says when it runs."""
    folder = tmp_path_factory.mktemp("evil")
    (folder / "evil.cpp").write_text(EVIL)
    call = [*compiler.command(), "-shared", "-fPIC", "-o", str(folder / "evil.so"), str(folder / "evil.cpp")]
    subprocess.run(call, check=True)
    return (folder / "evil.so").read_bytes()


def plant(cache: Path, library: bytes) -> None:
    """Put one library in the place of all, with the right digest, which is no secret."""
    for path in cache.iterdir():
        path.write_bytes(library + libraries._digest(path.name, library))


def test_what_is_planted_would_run(tmp_path: Path, warm: Warm, evil: bytes) -> None:
    """In a cache that is trusted: the tests below would see it."""
    cache = warm.copy(tmp_path)
    plant(cache, evil)
    process = processes.start(STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx)
    assert process.communicate(timeout=60)[0].startswith("EVIL\n")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o1777])
def test_a_directory_that_others_can_write_to(tmp_path: Path, warm: Warm, evil: bytes, mode: int) -> None:
    cache = warm.copy(tmp_path)
    plant(cache, evil)
    cache.chmod(mode)
    before = contents(cache)
    reason, printed = warned(processes.run(WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx))
    assert reason == f"Others own it or can write to it: {cache}"
    assert printed == warm.printed
    assert len(warm.calls()) == len(names(warm.cache))
    assert contents(cache) == before


def test_a_parent_in_which_others_can_rename_it(tmp_path: Path, warm: Warm) -> None:
    """Unless only its owner can, as in /tmp."""
    place = tmp_path / "all"
    place.mkdir()
    cache = warm.copy(place)
    place.chmod(0o777)
    reason, printed = warned(processes.run(WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx))
    assert (reason, printed) == (f"Others can rename what lies in it: {place}", warm.printed)
    warm.calls()
    for mode in (0o1777, 0o775):
        place.chmod(mode)
        assert processes.run(WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx) == warm.printed
    assert warm.calls() == []


def test_a_temporary_directory_in_which_others_can_rename(tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "all"
    place.mkdir()
    place.chmod(0o777)
    code = processes.FAILING_STEP
    text = processes.run(code, GPU_ADAM_CACHE=tmp_path / "file", TMPDIR=place, CXX=warm.cxx)
    assert "DeviceError [] [1.0, 1.0, 1.0]\n" in text
    assert text.splitlines()[-1] == (
        f"the address look-up needs a directory in which to compile (got Others can rename what lies in it: {place}); "
        "set GPU_ADAM_CACHE or TMPDIR to one with room."
    )
    assert names(place) == []


def others(path: Path) -> str:
    """Make a file or directory somebody else's; returns code that a process needs to see it so."""
    if os.geteuid() == 0:
        os.chown(path, NOBODY, -1)
        return ""
    return f"import os\nos.geteuid = lambda: {NOBODY}\n"


def test_a_directory_of_another_user(tmp_path: Path, warm: Warm, evil: bytes) -> None:
    cache = warm.copy(tmp_path)
    plant(cache, evil)
    code = others(cache) + WARNED_STEP
    reason, printed = warned(processes.run(code, GPU_ADAM_CACHE=cache, CXX=warm.cxx))
    assert (reason, printed) == (f"Others own it or can write to it: {cache}", warm.printed)


@pytest.mark.parametrize("mode", [0o664, 0o646, *([0o644] if os.geteuid() == 0 else [])])
def test_a_file_of_others_is_built_again(tmp_path: Path, warm: Warm, evil: bytes, mode: int) -> None:
    """One that others could write to, or, where the test may give it away, that is another's."""
    cache = warm.copy(tmp_path)
    plant(cache, evil)
    for path in cache.iterdir():
        path.chmod(mode)
        if mode == 0o644:
            others(path)
    assert processes.run(WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx) == warm.printed
    assert len(warm.calls()) == len(names(warm.cache))
    assert all(libraries._whole(path) for path in cache.iterdir())


# What cannot be a cache.


WITHOUT_HOME = """
import pwd
def missing(user):
    raise KeyError(user)
pwd.getpwuid = pwd.getpwnam = missing
"""


@pytest.mark.parametrize("given", [None, "~/x", "~nobody-of-this-name/x"])
def test_a_user_without_a_home(warm: Warm, given: str | None) -> None:
    """As in a container that is started with --user."""
    code = WITHOUT_HOME + WARNED_STEP
    reason, printed = warned(processes.run(code, GPU_ADAM_CACHE=given, HOME=None, XDG_CACHE_HOME=None, CXX=warm.cxx))
    assert "home directory" in reason
    assert reason.endswith(f": {given or '~/.cache/gpu_adam'}")
    assert printed == warm.printed


def test_info_of_a_user_without_a_home() -> None:
    code = f"{WITHOUT_HOME}\nfrom gpu_adam.__main__ import main\nmain(['info'])"
    text = processes.run(code, GPU_ADAM_CACHE=None, HOME=None, XDG_CACHE_HOME=None, COLUMNS=200)
    assert "a temporary directory, because of Could not determine home directory: ~/.cache/gpu_adam" in text


def test_info_names_the_cache(tmp_path: Path) -> None:
    """Also one whose name is no text."""
    code = "from gpu_adam.__main__ import main\nmain(['info'])"
    name = os.fsdecode(bytes(tmp_path) + b"/\xff")
    text = processes.run(code, GPU_ADAM_CACHE=name, COLUMNS=300, PYTHONIOENCODING="utf-8:strict")
    assert f"{tmp_path}/? " in text


def test_a_file_in_the_way(tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        text = processes.run(WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx)
        assert warned(text) == (f"File exists: {tmp_path / 'file'}", warm.printed)


def test_the_compiler_writes_where_nobody_else_does(tmp_path: Path) -> None:
    """What it keeps, too: into the cache, or a directory of its own, never into one with a name that others know."""
    cxx = compiler_script(tmp_path, f'echo "$TMPDIR $ZIG_GLOBAL_CACHE_DIR" >> {tmp_path}/log; compile "$@"')
    (tmp_path / "temporary").mkdir()
    for cache in ("cache", "compiler/cache"):
        processes.run(WARNED_STEP, GPU_ADAM_CACHE=tmp_path / cache, TMPDIR=tmp_path / "temporary", CXX=cxx)
        version, *calls = (tmp_path / "log").read_text().splitlines()
        assert version == f"{tmp_path}/temporary "
        assert len(calls) >= 3
        for call in calls:
            temporary, kept = map(Path, call.split())
            assert temporary.name.startswith(libraries._WORKSHOP)
            if cache == "cache":
                assert (temporary.parent, kept) == (tmp_path / "cache", tmp_path / "cache" / "zig")
            else:
                assert (temporary.parent, kept.parent) == (tmp_path / "temporary", temporary)
        (tmp_path / "log").unlink()
    assert names(tmp_path / "temporary") == []


def failing(call: str, condition: str, number: int) -> str:
    """Code that makes a function of `os` fail where a condition on its arguments `a` holds."""
    return f"""
import os
real_{call} = os.{call}
def failing_{call}(*a, **k):
    if {condition}:
        raise OSError({number}, os.strerror({number}), str(a[0]))
    return real_{call}(*a, **k)
os.{call} = failing_{call}
"""


def test_a_directory_that_can_only_be_read(tmp_path: Path, warm: Warm) -> None:
    """What is in it is used; what is not is compiled elsewhere."""
    cache = warm.copy(tmp_path)
    readonly = failing("mkdir", f"str(a[0]).startswith({str(cache)!r} + '/')", errno.EROFS)
    assert processes.run(readonly + WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx) == warm.printed
    assert warm.calls() == []
    next(cache.iterdir()).unlink()
    reason, printed = warned(processes.run(readonly + WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx))
    assert reason.startswith(f"Read-only file system: {cache}/")
    assert printed == warm.printed
    assert len(warm.calls()) == 1


def refusing_to_read(condition: str) -> str:
    """Code that lets a process read no file whose name `path` fulfils a condition."""
    return f"""
import builtins
real_open = builtins.open
def refusing(path, *a, **k):
    if {condition}:
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, *a, **k)
builtins.open = refusing
"""


def test_files_that_cannot_be_read_are_built_again(tmp_path: Path, warm: Warm) -> None:
    cache = warm.copy(tmp_path)
    code = refusing_to_read(f"str(path).startswith({str(cache)!r} + '/host-')") + WARNED_STEP
    assert processes.run(code, GPU_ADAM_CACHE=cache, CXX=warm.cxx) == warm.printed
    assert len(warm.calls()) == len(names(warm.cache))
    assert names(cache) == names(warm.cache)


def test_a_directory_in_which_no_file_can_be_read(tmp_path: Path, warm: Warm) -> None:
    cache = warm.copy(tmp_path)
    code = refusing_to_read(f"str(path).startswith({str(cache)!r})") + WARNED_STEP
    reason, printed = warned(processes.run(code, GPU_ADAM_CACHE=cache, CXX=warm.cxx))
    assert reason.startswith(f"Permission denied: {cache}/")
    assert printed == warm.printed


def test_a_directory_that_fills_up_at_the_end(tmp_path: Path, warm: Warm) -> None:
    """The library is there and loaded: it is not compiled once more, and half of it is not kept."""
    code = failing("fsync", "True", errno.ENOSPC) + WARNED_STEP
    reason, printed = warned(processes.run(code, GPU_ADAM_CACHE=tmp_path / "cache", CXX=warm.cxx))
    assert reason.startswith("No space left on device: ")
    assert printed == warm.printed
    assert len(warm.calls()) == len(names(warm.cache))
    assert names(tmp_path / "cache") == []


NOEXEC = """
import ctypes
def refusing(kind):
    class Refusing(kind):
        def __init__(self, name, *arguments, **options):
            if str(name).startswith({cache!r}):
                raise OSError(f"{{name}}: failed to map segment from shared object")
            super().__init__(name, *arguments, **options)
    return Refusing
ctypes.CDLL, ctypes.PyDLL = refusing(ctypes.CDLL), refusing(ctypes.PyDLL)
"""


def test_a_mount_from_which_no_code_may_run(tmp_path: Path, warm: Warm) -> None:
    """Libraries are kept there, and copied to where they run."""
    cache = tmp_path / "cache"
    code = NOEXEC.format(cache=str(cache)) + WARNED_STEP
    for compiled in (len(names(warm.cache)), 0):
        reason, printed = warned(processes.run(code, GPU_ADAM_CACHE=cache, CXX=warm.cxx))
        assert reason.startswith(str(cache))
        assert reason.endswith(": failed to map segment from shared object")
        assert printed == warm.printed
        assert len(warm.calls()) == compiled
        assert names(cache) == names(warm.cache)


def test_no_mount_from_which_code_may_run(tmp_path: Path, warm: Warm) -> None:
    code = NOEXEC.format(cache=str(tmp_path)) + processes.FAILING_STEP
    text = processes.run(code, GPU_ADAM_CACHE=tmp_path / "cache", TMPDIR=tmp_path, CXX=warm.cxx)
    what, message = text.split("\n")
    assert what == "KernelCompileError [] [1.0, 1.0, 1.0]"
    assert message.startswith(f"the address look-up must become a library that loads (got {tmp_path}")
    assert message.endswith(", or TMPDIR to a directory from which code may run.")
    assert names(tmp_path) == ["cache"]
    assert names(tmp_path / "cache") == []


def mounted(place: Path, options: str) -> tuple[str, ...]:
    """Words of a command that runs another one where a file system in memory is mounted at `place`."""
    words = ("unshare", "--map-root-user", "--mount", "sh", "-c")
    mount = (*words, f'mount -t tmpfs -o mode=755,{options} none "$0" && exec "$@"', str(place))
    with contextlib.suppress(OSError):
        if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode == 0:
            return mount
    pytest.skip("needs leave to mount a file system")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("noexec", "failed to map segment from shared object"),
        ("size=64k", "No space left on device"),  # not even the source
        ("size=1m", "No space left on device"),  # room for source and library, and not for what comes in between
        ("ro", "Read-only file system"),
    ],
)
def test_mounts_of_the_system(tmp_path: Path, warm: Warm, options: str, expected: str) -> None:
    """The same, as the system does it."""
    prefix = mounted(tmp_path, options)
    reason, printed = warned(processes.run(WARNED_STEP, prefix=prefix, GPU_ADAM_CACHE=tmp_path, CXX=warm.cxx))
    assert expected in reason
    assert printed == warm.printed


# What ended processes leave.


def test_a_killed_compilation_leaves_nothing_for_long(tmp_path: Path, warm: Warm) -> None:
    cache, started = tmp_path / "cache", tmp_path / "started"
    cxx = compiler_script(tmp_path, f'case "$*" in *kernel.cpp) echo $$ > {started}; exec sleep 1000;; esac')
    process = processes.start(STEP, GPU_ADAM_CACHE=cache, CXX=cxx)
    for _ in range(600):
        if started.exists() and started.read_text():
            break
        time.sleep(0.05)
    process.kill()
    process.communicate()
    os.kill(int(started.read_text()), signal.SIGKILL)
    assert len(names(cache)) == 1
    assert processes.run(WARNED_STEP, GPU_ADAM_CACHE=cache, CXX=warm.cxx) == warm.printed
    assert names(cache) == names(warm.cache)


def test_a_compilation_at_work_is_left_alone(tmp_path: Path) -> None:
    """It holds a lock; one without has ended, unless it is empty, and so about to begin."""
    names = ("busy", "ended", "empty", "another", "fifo", "link")
    busy, ended, empty, another, fifo, link = (tmp_path / f"{libraries._WORKSHOP}{name}" for name in names)
    mine = tmp_path / "mine"
    for path in (busy, ended, empty, another, mine):
        path.mkdir()
    for path in (busy, ended, another, mine):
        (path / "kernel.cpp").touch()
    os.mkfifo(fifo)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for somebody to write into a FIFO"))
    signal.alarm(20)
    link.symlink_to(mine)
    others = {empty, fifo, link, mine}
    if os.geteuid() == 0:
        os.chown(another, NOBODY, -1)
        others.add(another)
    lock = os.open(busy, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    with libraries._workshop(tmp_path) as work:
        assert set(tmp_path.iterdir()) == {busy, work, *others}
        (work / "kernel.cpp").touch()
        with libraries._workshop(tmp_path) as second:
            assert work.exists()
            assert second != work
    os.close(lock)
    with libraries._workshop(tmp_path):
        assert not busy.exists()
    signal.alarm(0)
    assert set(tmp_path.iterdir()) == others
    assert (link / "kernel.cpp").exists()
