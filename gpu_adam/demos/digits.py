"""A neural network of two layers learns the UCI handwritten digits: 8x8 pixels in, one of ten classes out.

    h = max(x·w1 + b1, 0)        p = softmax(h·w2 + b2)        loss = -log p[class]

The gradients are written out by hand. Variables of 16 bits meet pixels of float32, which makes the gradients float32.
Every fifth ten of images is held out. The rest is seen in random batches, one image in five moved by a pixel along each
axis: that makes about 98 % of the held-out images right instead of 97 %.

On several ranks each computes the gradients of its share of a batch, which all draw alike. As a client of a service the
demo trains the service's variables, by batches of its own.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any, ClassVar

import numpy as np

import gpu_adam
from gpu_adam.communicators import Communicator
from gpu_adam.demos import Demo, product
from gpu_adam.distributed import DataParallelAdam, ShardedAdam
from gpu_adam.errors import ArgumentValueError
from gpu_adam.kernels import dtype_named
from gpu_adam.schedules import CosineDecay
from gpu_adam.service import Client

BATCH, HIDDEN, CLASSES, SIDE = 64, 128, 10, 8
CORNERS = np.array([1] * 8 + [0, 2])  # 1 is unmoved


class Digits(Demo):
    """Handwritten digits; the rate falls along a cosine within `default_steps` and then stays at its end.

    Choices: the variables' "dtype", float32, float16, bfloat16 or float64; "master", Adam's `master_weights`.

    Args:
        seed: as of every demo; the same on all ranks.
        ranks: those that share each batch; None for this process alone.
        replicated: whether each rank has the slots of all variables, in place of a share of them.
        service: a client of a service that has an optimizer "digits" with this demo's variables; None for an optimizer
            of its own.
        **choices: as of every demo.
    """

    name = "digits"
    default_steps = 3000
    defaults: ClassVar[Mapping[str, Any]] = {"dtype": "float32", "master": False}

    def __init__(
        self,
        seed: int = 0,
        ranks: Communicator | None = None,
        replicated: bool = False,
        service: Client | None = None,
        **choices: Any,
    ) -> None:
        self._service = service
        kind = DataParallelAdam if replicated else ShardedAdam
        self._adam: Any = gpu_adam.Adam if ranks is None else partial(kind, ranks)
        self._share = slice(None) if ranks is None else slice(ranks.rank, None, ranks.size)
        self._mean_of = BATCH if ranks is None else BATCH / ranks.size  # of which the mean over ranks is the batch's
        super().__init__(seed, **choices)

    def _model(self, generator: np.random.Generator) -> tuple[Sequence[gpu_adam.Variable], gpu_adam.Adam]:
        dtype = dtype_named(self.choices["dtype"])
        with resources.files("gpu_adam").joinpath("data/digits.npz").open("rb") as file, np.load(file) as data:
            # One pixel of margin on each side, so that a moved image is a slice of it.
            images = np.pad(data["images"].astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
            labels = data["labels"].astype(np.int64)
        held_out = np.arange(len(labels)) // 10 % 5 == 4
        # The pixels stay on the host: moving them is cheap there, and a batch is 16 KiB.
        self.images, self.labels = images[~held_out], labels[~held_out]
        self.test_images, self.test_labels = images[held_out], labels[held_out]

        if self._service is not None:
            return _served(self._service)

        def layer(name: str, rows: int, columns: int) -> tuple[gpu_adam.Variable, gpu_adam.Variable]:
            limit = np.sqrt(6 / (rows + columns))  # Glorot
            weights = generator.uniform(-limit, limit, (rows, columns)).astype(dtype)
            zeros = np.zeros(columns, dtype)
            return gpu_adam.Variable(weights, name=f"w{name}"), gpu_adam.Variable(zeros, name=f"b{name}")

        variables = (*layer("1", SIDE * SIDE, HIDDEN), *layer("2", HIDDEN, CLASSES))
        rate = CosineDecay(0.01, self.default_steps, alpha=0.01)
        return variables, self._adam(rate, master_weights=self.choices["master"])

    def batch(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw pixels [n, 64] and labels [n], of which this rank has its share."""
        rows = generator.integers(len(self.labels), size=BATCH)[self._share]
        top, left = CORNERS[generator.integers(len(CORNERS), size=(2, BATCH))[:, self._share]]
        return _window(self.images[rows], top, left), self.labels[rows]

    def _train(self, generator: np.random.Generator) -> Any:
        xp = self.xp
        x, labels = (self.device.array(host) for host in self.batch(generator))
        w1, b1, w2, b2 = self.variables
        h = xp.maximum(product(x, w1.value) + b1.value, 0)
        p = _softmax(xp, product(h, w2.value) + b2.value)
        hit = labels[:, None] == xp.arange(CLASSES)
        d2 = (p - hit) / self._mean_of  # d loss / d logits
        d1 = product(d2, w2.value.T) * (h > 0)
        gradients = (product(x.T, d1), d1.sum(0), product(h.T, d2), d2.sum(0))
        self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))
        loss = -xp.log((p * hit).sum(1) + 1e-30).mean()
        return xp.stack([loss, (p.argmax(1) == labels).mean()])

    def accuracy(self) -> float:
        """Return the fraction of the held-out images that is recognised, 0 to 1."""
        unmoved = np.ones(len(self.test_labels), np.int64)
        w1, b1, w2, b2 = (variable.value for variable in self.variables)
        with self.here():
            x = self.device.array(_window(self.test_images, unmoved, unmoved))
            guess = (product(self.xp.maximum(product(x, w1) + b1, 0), w2) + b2).argmax(1)
            return float((guess == self.device.array(self.test_labels)).mean())

    def result(self) -> list[tuple[str, str]]:
        """Return the accuracy on the held-out images."""
        return [("test accuracy", f"{self.accuracy():.1%} of {len(self.test_labels)} images never trained on")]


def _served(client: Client) -> tuple[Sequence[gpu_adam.Variable], Any]:
    """The service's variables and optimizer."""
    optimizer = client.optimizer("digits")
    shapes = {"w1": (SIDE * SIDE, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, CLASSES), "b2": (CLASSES,)}
    found = {name: variable.shape for name, variable in optimizer.variables.items()}
    if found != shapes:
        rule = f"must have the variables {shapes}"
        raise ArgumentValueError("the service's optimizer 'digits'", rule, found, "serve docker/service.toml")
    return [optimizer.variables[name] for name in shapes], optimizer


def _window(images: np.ndarray, top: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Cut from images [n, 10, 10] one of 8x8 each, at its own corner, and flatten: [n, 64]."""
    side = np.arange(SIDE)
    n = np.arange(len(images))[:, None, None]
    return images[n, (top[:, None] + side)[:, :, None], (left[:, None] + side)[:, None, :]].reshape(len(images), -1)


def _softmax(xp: Any, logits: Any) -> Any:
    e = xp.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)
