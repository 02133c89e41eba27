"""Small trainings on real data, without display: `gpu-adam demo` shows them.

A demo trains on the current device. All randomness is drawn on the host from (seed, step), so the state of a training
is its variables, its optimizer and a step number, and a resumed one continues bit for bit.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from zlib import crc32

import numpy as np

import gpu_adam
from gpu_adam.errors import CheckpointError
from gpu_adam.state import checkpoint

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True)
class Measure:
    """How well the last step went.

    Attributes:
        loss: what is minimised; of a batch the mean, in nats.
        score: a fraction that tells people more; by default of the answers that are right, 0 to 1.
    """

    loss: float
    score: float


class Demo(ABC):
    """A model, its data and its optimizer on the current device.

    Args:
        seed: >= 0; the same seed gives the same training on the same device.
        **choices: others than some of `defaults`.

    Attributes:
        is_watched: whether the optimizer measures its steps.
    """

    name: ClassVar[str]
    default_steps: ClassVar[int]
    defaults: ClassVar[Mapping[str, Any]] = {}
    """What else a kind of demo leaves to its user, as JSON has it."""
    shown: ClassVar[str] = "loss {0.loss:.3f}  accuracy {0.score:4.0%}"
    """How a progress bar shows a `Measure`."""

    def __init__(self, seed: int = 0, **choices: Any) -> None:
        self.seed, self.choices, self.step = seed, {**self.defaults, **choices}, 0
        self.is_watched = False
        self.device = gpu_adam.get_device()
        self.xp: Any = self.device.xp
        self.variables, self.optimizer = self._model(self.generator(0))
        self.optimizer.build(self.variables)
        self._last: Any = None

    @abstractmethod
    def _model(self, generator: np.random.Generator) -> "tuple[Sequence[gpu_adam.Variable], gpu_adam.Adam]":
        """Load the data, return the initial variables and their optimizer."""

    @abstractmethod
    def _train(self, generator: np.random.Generator) -> Any:
        """Do one update, return loss and score as one device array of two numbers."""

    @abstractmethod
    def result(self) -> list[tuple[str, str]]:
        """Return what was learnt, as (label, value) lines."""

    def generator(self, stream: int) -> np.random.Generator:
        """Return the randomness of one stream: 0 for the initial values, t for step t."""
        return np.random.default_rng((self.seed, stream))

    def here(self) -> AbstractContextManager[Any]:
        """Return a context in which array functions compute on this demo's device: CuPy's go to its current one."""
        return nullcontext() if self.xp is np else self.xp.cuda.Device(int(self.device.name.removeprefix("cuda:")))

    def train(self) -> None:
        """Do one step; on a GPU it is only enqueued."""
        with self.here():
            self._last = self._train(self.generator(self.step + 1))
        self.step += 1

    def watch(self) -> None:
        """Have the optimizer measure its steps from now on, which changes no number of theirs."""
        self.is_watched = True
        state = self.optimizer.export()
        self.optimizer = gpu_adam.Adam.from_config({**self.optimizer.get_config(), "telemetry": True})
        self.optimizer.build(self.variables)
        self.optimizer.restore(state)

    def measure(self) -> Measure:
        """Return the last step's numbers, waiting for the device; there must have been a step."""
        loss, score = self._last.tolist()
        return Measure(loss, score)

    def data(self) -> bytes:
        """Return what a saved training must have in common with this one, besides its seed and its choices."""
        return b""

    def notes(self) -> dict[str, Any]:
        """Return what else a resumed training is to know, as JSON has it."""
        return {}

    def recall(self, notes: Mapping[str, Any]) -> None:  # noqa: B027  # most have nothing to recall
        """Take back what `notes` returned."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write variables and optimizer to a file of `Adam.save`, and to its `user` what makes this demo."""
        user = {"demo": self.name, "seed": self.seed, **self.choices, "data": crc32(self.data()), **self.notes()}
        self.optimizer.save(path, variables=True, user=user)

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> "Self":
        """Return the training that `save` wrote, on the current device.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file holds something else, or a training on other data.
        """
        user = checkpoint.read(path)[1].get("user") or {}
        if user.get("demo") != cls.name:
            remedy = f"pass a file that `gpu-adam demo {cls.name} --save FILE` wrote"
            got = user.get("demo", "another checkpoint")
            raise CheckpointError(str(path), f"must hold a training of the demo {cls.name}", got, remedy)
        demo = cls(user["seed"], **{name: user[name] for name in cls.defaults})
        if user["data"] != crc32(demo.data()):
            remedy = "resume with the versions of gpu_adam and Python that saved it"
            raise CheckpointError(str(path), "must fit this demo's data", "others", remedy)
        demo.optimizer.load(path, variables=True)
        demo.step = int(demo.optimizer.iterations)
        demo.recall(user)
        return demo


def product(a: Any, b: Any) -> Any:
    """Return the matrix product of a [n, k] and b [k, m] on either device.

    CuPy's `@` calls cuBLAS, which the extras cuda12 and cuda13 do not bring; a demo's matrices are small enough to
    multiply and add instead, at the price of n·k·m temporary numbers.
    """
    return a @ b if isinstance(a, np.ndarray) else (a[:, :, None] * b[None]).sum(1)
