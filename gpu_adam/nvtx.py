"""NVTX ranges around the stages of a step, for Nsight Systems and Nsight Compute, when ``GPU_ADAM_NVTX=1``.

Decided when a stage is defined: without the variable the functions are the bare ones, and a step pays nothing.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def stage(name: str) -> Callable[[_Function], _Function]:
    """A decorator: calls of the function are a range "gpu_adam: NAME".

    Args:
        name: what the stage does: step, and in it check, read and update.
    """
    if os.environ.get("GPU_ADAM_NVTX") != "1":
        return lambda function: function
    try:
        nvtx = importlib.import_module("cupy.cuda.nvtx")
    except ImportError:  # no GPU, so nobody who would look at ranges
        return lambda function: function
    message = f"gpu_adam: {name}"

    def ranged(function: _Function) -> _Function:
        @functools.wraps(function)
        def inside(*arguments: Any, **keywords: Any) -> Any:
            nvtx.RangePush(message)
            try:
                return function(*arguments, **keywords)
            finally:
                nvtx.RangePop()

        return inside  # type: ignore[return-value]

    return ranged
