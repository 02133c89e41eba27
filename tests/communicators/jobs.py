"""Jobs of MPI: a script in several processes, with an end that is near."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import processes
import pytest

SECONDS = 60
"""After which a job is called hung."""

_FOLDER = Path(__file__).parents[1]

# Open MPI wants to be asked for more processes than processors, and as root.
_ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": 1,
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1,
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "GPU_ADAM_THREADS": 1,
}


class Ended(NamedTuple):
    """What became of a job."""

    status: int
    out: str
    err: str


def launcher() -> str:
    """The command mpiexec; the test is skipped where that or mpi4py is missing."""
    beside = Path(sys.executable).with_name("mpiexec")
    command = str(beside) if beside.exists() else shutil.which("mpiexec")
    if importlib.util.find_spec("mpi4py") is None or command is None:
        pytest.skip("needs mpi4py and mpiexec, of the extra mpi")
    return command


def run(folder: Path, ranks: int, script: str) -> Ended:
    """Run a script, which is written into the folder, in so many processes; fail if the job hangs."""
    path = folder / "script.py"
    path.write_text(script)
    command = [launcher(), "-n", str(ranks), sys.executable, str(path)]
    environment = processes.environment((_FOLDER,), **_ALLOWED)
    with subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        try:
            out, err = job.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            job.terminate()  # the launcher ends its processes
            out, err = job.communicate()
            pytest.fail(f"the job hangs after {SECONDS} s:\n{out}\n{err}")
    return Ended(job.returncode, out, err)


def is_alive(process: int) -> bool:
    """Whether there is such a process; one that nobody has waited for is none."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
