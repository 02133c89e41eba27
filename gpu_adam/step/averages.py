"""Averages that take the variables' places at the end of guarded steps: the device alone knows which steps these are.

A copy is made by the kernel of sums, which begins a sum by `theta = g` (adam_math.cuh): the average is its gradient. It
runs in every guarded step, and `apply` says whether it changes anything. A copy of the device's own, as steps without a
guard have it, could not be left out.
"""

from __future__ import annotations

import numpy as np

from gpu_adam.hyperparameters import OWN_SETTINGS
from gpu_adam.kernels import UpdateRule
from gpu_adam.state.adam_state import Copies
from gpu_adam.step.dense import DenseLaunch, DenseTable, rows_of
from gpu_adam.step.groups import DenseGradients, DenseGroup

_COPIES = UpdateRule("real_imag", accumulates=True, guarded=True)


def overwriting_launches(copies: Copies) -> list[DenseLaunch]:
    """The launches that overwrite variables, and their masters, by their averages, where their scalars have it.

    Args:
        copies: the variables of one device and the masters, each with its average.
    """
    by_dtype: dict[np.dtype, list[int]] = {}
    for number, (target, _) in enumerate(copies):
        by_dtype.setdefault(target.dtype, []).append(number)
    launches = []
    for numbers in by_dtype.values():
        targets, averages = zip(*(copies[number] for number in numbers), strict=True)
        group = DenseGroup(targets, numbers, _COPIES, [OWN_SETTINGS] * len(targets), averages[0].dtype)
        launch = DenseLaunch(group, DenseTable(group, rows_of(group, {}, [0] * len(targets))))
        launch.bind(DenseGradients(group, group.device.addresses([average._storage for average in averages])))
        launches.append(launch)
    return launches
