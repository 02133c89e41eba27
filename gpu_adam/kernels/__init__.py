"""The border to CUDA C++: the dtypes, slots and structs that both sides know, the kernels' sources, and their variants.

    dtypes.py       DTYPES, a row for each dtype
    slot_specs.py   SLOT_SPECS, a row for each slot
    structs.py      NumPy's view of the C++ structs, and kernel arguments
    sources.py      the text of a file of cuda/ with its headers
    variants.py     UpdateRule, and the kernel that each rule and dtype has

A new dtype or slot is a row of its table; ``cuda/README.md`` says what else.
"""

from gpu_adam.kernels.dtypes import COMPLEX_MODES, DTYPES, HALVES, MIXING, Dtype, Layout, dtype_named, dtype_row
from gpu_adam.kernels.slot_specs import SLOT_SPECS, SlotSpec, slot_spec, slots_of
from gpu_adam.kernels.sources import Kernel, Source, directory, kernel_names
from gpu_adam.kernels.structs import (
    EMBEDDING_TABLE,
    GUARD,
    GUARD_PLACE,
    GUARD_ROWS,
    INDEX_ERRORS,
    INDICES,
    KEYS,
    LOSS_SCALE,
    MEASURED_SUMS,
    NO_INDEX_ERRORS,
    SLOT_POINTERS,
    TENSOR,
    TENSOR_TABLE,
    pointer,
    scalar,
    slot_pointers,
    step_scalars,
    struct,
)
from gpu_adam.kernels.variants import (
    ACCUMULATION,
    BLOCK_SIZE,
    CHUNK,
    DIGIT_BITS,
    GUARDED,
    MEASURED,
    MIXED_UPDATES,
    SORT_ROWS,
    SORT_RUN,
    UpdateRule,
    dense,
    guard,
    norm,
    sort,
    sparse,
    tile_size,
    update_rules,
    variants,
)

__all__ = [
    "ACCUMULATION",
    "BLOCK_SIZE",
    "CHUNK",
    "COMPLEX_MODES",
    "DIGIT_BITS",
    "DTYPES",
    "EMBEDDING_TABLE",
    "GUARD",
    "GUARDED",
    "GUARD_PLACE",
    "GUARD_ROWS",
    "HALVES",
    "INDEX_ERRORS",
    "INDICES",
    "KEYS",
    "LOSS_SCALE",
    "MEASURED",
    "MEASURED_SUMS",
    "MIXED_UPDATES",
    "MIXING",
    "NO_INDEX_ERRORS",
    "SLOT_POINTERS",
    "SLOT_SPECS",
    "SORT_ROWS",
    "SORT_RUN",
    "TENSOR",
    "TENSOR_TABLE",
    "Dtype",
    "Kernel",
    "Layout",
    "SlotSpec",
    "Source",
    "UpdateRule",
    "dense",
    "directory",
    "dtype_named",
    "dtype_row",
    "guard",
    "kernel_names",
    "norm",
    "pointer",
    "scalar",
    "slot_pointers",
    "slot_spec",
    "slots_of",
    "sort",
    "sparse",
    "step_scalars",
    "struct",
    "tile_size",
    "update_rules",
    "variants",
]
