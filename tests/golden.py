"""Reader of tests/data/keras_golden.{npz,json}: trajectories recorded from TensorFlow 2.0.0 and 2.15.1."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]
DATA = Path(__file__).parent / "data"


def load(folder: Path = DATA) -> Iterator[tuple[dict[str, Any], Arrays, Arrays, Arrays | None]]:
    """Yield (case, inputs, outputs, outputs215): the case's JSON dict, then {key: array in its own dtype}.

    outputs215 is TensorFlow 2.15.1's result of the same case, None where it is identical or not comparable.
    """
    with np.load(folder / "keras_golden.npz") as arrays:
        for case in json.loads((folder / "keras_golden.json").read_text())["cases"]:
            name = case["name"]
            inputs = _cut(arrays[f"{name}/in"], case["in_layout"])
            outputs = _cut(arrays[f"{name}/out"], case["out_layout"])
            later = _cut(arrays[f"{name}/out215"], case["out_layout"]) if f"{name}/out215" in arrays else None
            yield case, inputs, outputs, later


def _cut(flat: npt.NDArray[np.float64], layout: list[tuple[str, str, list[int]]]) -> Arrays:
    start, values = 0, {}
    for key, dtype, shape in layout:
        size = int(np.prod(shape, dtype=np.int64))
        with np.errstate(all="ignore"):  # recorded NaN and infinities, some cast to integers
            values[key] = flat[start : start + size].reshape(shape).astype(dtype)
        start += size
    return values
