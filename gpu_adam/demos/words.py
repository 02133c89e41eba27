"""Skip-gram word vectors of the Python reference, learnt from the text of `pydoc_data.topics`.

Two tables hold a vector per word, `centre` and `context`. With the dot product z of a word and a neighbour in the text,
and the dot products z' of that word and some random ones:

    loss = -log σ(z) - Σ log σ(-z')

A batch touches few rows, so its gradients are `IndexedSlices`; Adam nevertheless moves every row that has momentum, at
once or, with the choice "deferred", when the row is next looked up. Either way gives the same bits.

Reference: T. Mikolov et al., 2013, https://arxiv.org/abs/1310.4546 (negative sampling; frequent words thinned out).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

import gpu_adam
from gpu_adam.demos import Demo
from gpu_adam.schedules import PolynomialDecay

BATCH, WIDTH, NEGATIVES = 256, 32, 5
RATE = 0.01  # at the first step
WINDOW = 5  # neighbours on each side
MIN_COUNT = 5  # rarer words are left out
THINNING = 1e-3  # a word of a larger share f of the text is kept with probability sqrt(THINNING / f)
QUERIES = ("list", "function", "class", "import", "string", "exception", "iterator", "true")


class Words(Demo):
    """Word vectors; accuracy is how often the true neighbour scores above all random words.

    Choices: "sparse", the `sparse_update` of Adam, "dense" or "deferred".
    """

    name = "words"
    default_steps = 2000
    defaults: ClassVar[Mapping[str, Any]] = {"sparse": "dense"}

    def _model(self, generator: np.random.Generator) -> tuple[Sequence[gpu_adam.Variable], gpu_adam.Adam]:
        self.words, counts, texts = _read_topics()
        self.pairs = _neighbours(texts, counts, generator)
        frequency = counts**0.75
        self.cumulative = np.cumsum(frequency) / frequency.sum()
        shape = (len(self.words), WIDTH)
        centre = generator.uniform(-0.5 / WIDTH, 0.5 / WIDTH, shape).astype(np.float32)
        context = np.zeros(shape, np.float32)
        variables = (gpu_adam.Variable(centre, name="centre"), gpu_adam.Variable(context, name="context"))
        return variables, gpu_adam.Adam(rate(self.default_steps), sparse_update=self.choices["sparse"])

    def data(self) -> bytes:
        """Return the vocabulary: other Python versions have other texts."""
        return "\n".join(self.words).encode()

    def batch(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw words [n], and for each its neighbour and the random words [n, 1 + negatives]."""
        pairs = self.pairs[generator.integers(len(self.pairs), size=BATCH)]
        random = np.searchsorted(self.cumulative, generator.random((BATCH, NEGATIVES))).astype(np.int32)
        return np.ascontiguousarray(pairs[:, 0]), np.concatenate([pairs[:, 1:], random], axis=1)

    def _train(self, generator: np.random.Generator) -> Any:
        xp = self.xp
        words, others = (self.device.array(host) for host in self.batch(generator))
        centre, context = self.variables
        a, b = centre.gather(words), context.gather(others)  # [batch, width], [batch, 1 + negatives, width]
        z = (a[:, None] * b).sum(2)
        true = xp.arange(1 + NEGATIVES) == 0
        d = (0.5 + 0.5 * xp.tanh(0.5 * z) - true) / BATCH  # d loss / d z; σ through tanh cannot overflow
        d_centre = gpu_adam.IndexedSlices((d[..., None] * b).sum(1), words)
        d_context = gpu_adam.IndexedSlices((d[..., None] * a[:, None]).reshape(-1, WIDTH), others.ravel())
        self.optimizer.apply_gradients([(d_centre, centre), (d_context, context)])
        loss = xp.logaddexp(0, xp.where(true, -z, z)).sum(1).mean()
        return xp.stack([loss, (z[:, 0] > z[:, 1:].max(1)).mean()])

    def nearest(self, word: str, count: int = 6) -> list[str]:
        """Return the words whose vectors make the smallest angles with that of `word`, nearest first."""
        vectors = self.variables[0].numpy()
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        at = self.words.index(word)
        order = np.argsort(-(vectors @ vectors[at]), kind="stable")
        return [self.words[i] for i in order if i != at][:count]

    def result(self) -> list[tuple[str, str]]:
        """Return the nearest words of some common ones."""
        return [(f"near {word}", ", ".join(self.nearest(word))) for word in QUERIES if word in self.words]


def rate(steps: int, begin: float = RATE) -> PolynomialDecay:
    """Return a learning rate that falls along a line to a hundredth within so many steps, and then stays there."""
    return PolynomialDecay(begin, steps, end_learning_rate=begin / 100)


def _read_topics() -> tuple[list[str], np.ndarray, list[np.ndarray]]:
    """Return the vocabulary, most frequent first, its counts, and each topic as numbers into it."""
    from pydoc_data.topics import topics  # noqa: PLC0415  half a megabyte of text, for this demo only

    texts = [re.findall(r"[a-z_]*[a-z][a-z_]*", topics[key].lower()) for key in sorted(topics)]
    counts = Counter(word for text in texts for word in text)
    common = [(word, count) for word, count in counts.most_common() if count >= MIN_COUNT]
    number = {word: i for i, (word, _) in enumerate(common)}
    numbered = [np.array([number[word] for word in text if word in number], np.int32) for text in texts]
    return list(number), np.array([count for _, count in common]), numbered


def _neighbours(texts: list[np.ndarray], counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return all (word, neighbour) pairs of the thinned texts, [n, 2]."""
    keep = np.sqrt(THINNING * counts.sum() / counts)
    pairs = []
    for text in texts:
        kept = text[generator.random(len(text)) < keep[text]]
        for distance in range(1, WINDOW + 1):
            pair = np.stack([kept[:-distance], kept[distance:]], axis=1)
            pairs += [pair, pair[:, ::-1]]
    return np.concatenate(pairs)
