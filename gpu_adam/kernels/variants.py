"""Variants: one compilation of one file of ``cuda/`` for one row of the dtype table and one choice of switches.

The rule for switches: compile time for memory traffic, run time for arithmetic that has an exact neutral element. A
kernel with ``vhat`` moves one array more than a kernel without, so AMSGrad is a variant. A kernel that measures writes
sums besides, for which its threads share memory and wait for each other. A scalar of which one value
changes no bit of the result (a factor of 1.0: ``x * 1.0`` is ``x``) is an argument of a kernel that is there anyway.
(0.0 is no neutral element of the sum: ``x + 0.0`` turns -0.0 into 0.0.) Variants multiply, arguments do not.

Three switches are exceptions, because measurements say so: ``GPU_ADAM_CLIP``, ``GPU_ADAM_ADJUST`` and
``GPU_ADAM_STAGED``. adam_math.cuh has the reasons beside them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.kernels.dtypes import DTYPES, HALVES, MIXING, Layout
from gpu_adam.kernels.sources import Kernel, Source

CHUNK = 4096
"""Elements of a tensor that one block updates, and that one partial sum of a norm covers."""

SORT_RUN = 4096
"""Indices that one block sorts."""

SORT_ROWS = 2**27
"""A block sorts the indices of variables with fewer rows than this."""

DIGIT_BITS = 7
"""Bits of a row number that one pass of the sort looks at."""

BLOCK_SIZE = 256
"""CUDA threads of a block."""

# Shared memory for the gradient of a sparse tile. With so much all 2048 threads of a multiprocessor stay resident.
_TILE_BYTES = 16384

_SORT_DEFINES = tuple(
    f"GPU_ADAM_{name}={value}"
    for name, value in (("SORT_RUN", SORT_RUN), ("SORT_ROWS", SORT_ROWS), ("DIGIT_BITS", DIGIT_BITS))
)


class UpdateRule(NamedTuple):
    """Which update an optimizer does, as opposed to the numbers that an update is given: the key of a kernel variant.

    Attributes:
        complex_mode: one of COMPLEX_MODES. It chooses the dtype that a complex variable has for the kernels.
        amsgrad: whether the update keeps and uses the maximum of ``v``.
        bounded: whether gradients are clipped by value.
        norm: which norm gradients are clipped by: None, "each" variable's own, or the "global" one over all variables.
        ema: whether the update keeps an exponential moving average of the variable.
        adjusts: whether it changes the gradient's sign, adds a penalty's gradient or lets weights decay.
        slot_dtype: dtype of the moving averages of gradients; None for the one in which they are computed.
        master: whether variables of 16 bits have a master, which is not rounded.
        stochastic: whether variables of 16 bits are rounded to one of two neighbours by chance.
        scaled: whether the gradient comes multiplied by a scale, and is divided by it before it is clipped.
        guarded: whether the step's scalars are chosen on the device, which may also decide that nothing changes.
        searched: whether the gradients of a guarded step are searched for elements that are not finite.
        accumulates: whether the variable is a sum to which the gradient is added, and nothing else happens.
        measured: whether a guarded update adds up the squares of the variables and of what is added to them.
        overwrites: whether the averages take the variables' places after some steps.
    """

    complex_mode: str = "abs2"
    amsgrad: bool = False
    bounded: bool = False
    norm: str | None = None
    ema: bool = False
    adjusts: bool = False
    slot_dtype: str | None = None
    master: bool = False
    stochastic: bool = False
    scaled: bool = False
    guarded: bool = False
    searched: bool = False
    accumulates: bool = False
    measured: bool = False
    overwrites: bool = False

    @property
    def clip(self) -> int:
        """``GPU_ADAM_CLIP``: 0 for gradients as they are, 1 where they are clipped by norm, 2 where by value too."""
        return 2 if self.bounded else int(self.norm is not None)

    @property
    def sums_squares(self) -> bool:
        """Whether there is a pass over all gradients before the update."""
        return self.norm is not None or self.searched

    def layout(self, dtype: np.dtype, gradient: np.dtype) -> Layout:
        """How a variable of that dtype appears to the kernels, with a gradient of that dtype."""
        if dtype.kind == "c" and self.complex_mode == "real_imag":
            real = DTYPES[dtype.name].real_dtype
            return Layout(real, 2, real)
        return Layout(dtype.name, 1, gradient.name)

    def of(self, dtype_name: str) -> UpdateRule:
        """The rule for variables of that dtype alone, without what concerns those of 16 bits where it is another."""
        if dtype_name in HALVES or not (self.master or self.stochastic):
            return self
        return self._replace(master=False, stochastic=False)

    @property
    def switches(self) -> tuple[tuple[str, int], ...]:
        """What chooses the variant of an update: names of the preprocessor, and their numbers."""
        adjusts = 2 if self.scaled else int(self.adjusts)
        return (
            *(("AMSGRAD", self.amsgrad), ("EMA", self.ema), ("ADJUST", adjusts), ("CLIP", self.clip)),
            *(("MASTER", self.master), ("STOCHASTIC", self.stochastic), ("ACCUMULATE", self.accumulates)),
            ("MEASURE", self.measured),
        )


def _definitions(*switches: tuple[str, int]) -> tuple[str, ...]:
    return (*(f"GPU_ADAM_{name}={int(on)}" for name, on in switches), f"GPU_ADAM_CHUNK={CHUNK}")


def tile_size(dtype_name: str) -> int:
    """Elements of a tile of the sparse update."""
    return _TILE_BYTES // np.dtype(DTYPES[dtype_name].wide_dtype).itemsize


def dense(dtype_name: str, rule: UpdateRule, *, gradient: str | None = None, staged: int = 0) -> Kernel:
    """The update of all dense variables of a dtype.

    Args:
        dtype_name: a key of DTYPES.
        rule: the update.
        gradient: the gradients' dtype, by default the variables'.
        staged: where the scalars of the step are found, as adam_math.cuh lists: 0 in the argument ``scalars``, 1 or 2
            through the argument ``staged``, a pointer to device memory. At least 1 for a guarded step.
    """
    dtypes = dtype_name, gradient or dtype_name, rule.slot_dtype
    return _update("dense", dtypes, rule.of(dtype_name).switches, staged or int(rule.guarded))


def sparse(dtype_name: str, rule: UpdateRule, *, gradient: str | None = None, staged: int = 0) -> Kernel:
    """The update of one variable by some of its rows. Arguments as for dense."""
    dtypes = dtype_name, gradient or dtype_name, rule.slot_dtype
    return _update("sparse", dtypes, rule.of(dtype_name).switches, staged or int(rule.guarded))


def deferred(dtype_name: str, rule: UpdateRule, *, gradient: str | None = None, staged: int = 0) -> Kernel:
    """The update of the rows of one variable that have a gradient. Arguments as for dense."""
    dtypes = dtype_name, gradient or dtype_name, rule.slot_dtype
    return _update("deferred", dtypes, rule.of(dtype_name).switches, staged or int(rule.guarded))


def restart_log(dtype_name: str, rule: UpdateRule) -> Kernel:
    """The end of a log of deferred steps. Arguments as for dense."""
    return Kernel(deferred(dtype_name, rule).source, "restart_log")


def _types(dtype_name: str, gradient: str, slot_dtype: str | None) -> tuple[str, ...]:
    """The definitions of the types: a row of the dtype table, and what lies beside the variable."""
    row = DTYPES[dtype_name]
    slot, slot_real = (row.wide, row.stored_real) if slot_dtype is None else (DTYPES[slot_dtype].stored,) * 2
    beside = {"GRADIENT": DTYPES[gradient].stored, "SLOT": slot, "SLOT_REAL": slot_real}
    return (*row.defines, *(f"GPU_ADAM_{name}={type_name}" for name, type_name in beside.items()))


@functools.cache  # by what chooses the variant: rules that differ in nothing else have one kernel object
def _update(
    name: str, dtypes: tuple[str, str, str | None], switches: tuple[tuple[str, int], ...], staged: int
) -> Kernel:
    dtype_name = dtypes[0]
    defines = (*_types(*dtypes), *_definitions(*switches, ("STAGED", staged)))
    if name == "sparse":
        defines += (f"GPU_ADAM_TILE={tile_size(dtype_name)}",)
    if name != "dense":
        defines += _SORT_DEFINES
    return Kernel(Source(f"{name}.cu", defines), name)


def norm(dtype_name: str, kernel_name: str, rule: UpdateRule = UpdateRule()) -> Kernel:  # noqa: B008
    """A pass of norm.cu: square_sums, square_sums_of, clip_by_global_norm, clip_by_norms or add_square_sum.

    Args:
        dtype_name: of the gradients, a key of DTYPES.
        kernel_name: the pass.
        rule: the update for which it is.
    """
    return _norm(dtype_name, kernel_name, rule.bounded, rule.scaled, rule.guarded)


@functools.cache  # as above
def _norm(dtype_name: str, kernel_name: str, bounded: bool, scaled: bool, guarded: bool) -> Kernel:
    switches = UpdateRule(bounded=bounded, norm="global", scaled=scaled).switches
    defines = (*_types(dtype_name, dtype_name, None), *_definitions(*switches, ("STAGED", guarded)))
    return Kernel(Source("norm.cu", defines), kernel_name)


@functools.cache
def guard(kernel_name: str) -> Kernel:
    """A part of guard.cu: guard_begin or guard_end."""
    return Kernel(Source("guard.cu", ()), kernel_name)


@functools.cache
def sort(kernel_name: str) -> Kernel:
    """A step of the sort of row numbers: sort_rows, sort_keys, sort_count, sort_scan or sort_scatter."""
    return Kernel(Source("sort.cu", _SORT_DEFINES), kernel_name)


MIXED_UPDATES = (
    ("bfloat16", UpdateRule(), "float32"),
    ("bfloat16", UpdateRule(master=True), "float32"),
    ("float16", UpdateRule(master=True), "float32"),
    ("float32", UpdateRule(), "bfloat16"),
    ("float32", UpdateRule(), "float16"),
    ("float32", UpdateRule(accumulates=True), "bfloat16"),
)
"""Dtypes of variables, rules and dtypes of gradients, as training in mixed precision has them."""

GUARDED = UpdateRule(scaled=True, guarded=True, searched=True)
"""The update of a step with a loss scale."""

MEASURED = GUARDED._replace(measured=True)
"""The same with telemetry."""

ACCUMULATION = UpdateRule(accumulates=True)
"""The update of sums of gradients."""


def update_rules(dtype_name: str = "float32") -> list[UpdateRule]:
    """Rules for the variants of the updates of a dtype that tests compile and profiling lists.

    AMSGrad and clipping are on and off beside each other; averages and adjustments are on alone, and all together. What
    concerns numbers of 16 bits alone is on where the dtype has it.
    """
    clippings: list[dict[str, Any]] = [{}, {"norm": "global"}, {"bounded": True}]
    plain = [UpdateRule(amsgrad=amsgrad, **clipping) for amsgrad in (False, True) for clipping in clippings]
    everything = UpdateRule(amsgrad=True, bounded=True, ema=True, adjusts=True)
    rules = [*plain, UpdateRule(ema=True), UpdateRule(adjusts=True), everything]
    if dtype_name in MIXING:
        rules.append(UpdateRule(slot_dtype="bfloat16"))
    if dtype_name in HALVES:
        rules += [UpdateRule(master=True), everything._replace(master=True, slot_dtype="bfloat16")]
    if dtype_name == "bfloat16":
        rules += [UpdateRule(stochastic=True), everything._replace(stochastic=True)]
    return rules


def variants() -> list[Source]:
    """Sources that a step can ask for, each once, by these rules: tests compile them, and profiling lists them."""
    updates = [update(dtype, rule) for dtype in DTYPES for update in (dense, sparse) for rule in update_rules(dtype)]
    guarded = (GUARDED, MEASURED)
    updates += [update(dtype, rule) for dtype in DTYPES for update in (dense, sparse) for rule in guarded]
    updates += [update(dtype, ACCUMULATION) for dtype in DTYPES if dtype not in HALVES for update in (dense, sparse)]
    plain_and_all = [(dtype, rule) for dtype in DTYPES for rule in (UpdateRule(), update_rules(dtype)[-1])]
    updates += [deferred(dtype, rule) for dtype, rule in (*plain_and_all, ("float32", GUARDED))]
    mixed = [dense(dtype, rule, gradient=gradient) for dtype, rule, gradient in MIXED_UPDATES]
    rules = (UpdateRule(), UpdateRule(bounded=True), GUARDED)
    norms = [norm(dtype, "square_sums", rule) for dtype in DTYPES for rule in rules]
    return [kernel.source for kernel in (*updates, *mixed, *norms, sort("sort_rows"), guard("guard_begin"))]
