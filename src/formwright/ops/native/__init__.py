"""C++ kernels for loops that are no sequence of tensor operations, compiled on installation if there is a compiler.

Without them every operation has a PyTorch path with the same result. `FORMWRIGHT_NATIVE=0`, set before the start,
switches them off.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

# Our kernels share torch's OpenMP threads: the name of its runtime is resolved to the copy that torch has loaded.
import torch  # noqa: F401

SUFFIXES = {".so", ".pyd", ".dylib"}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, and in words what was found."""
    if os.environ.get("FORMWRIGHT_NATIVE") == "0":
        return None, "switched off by FORMWRIGHT_NATIVE=0"
    files = sorted(path for path in Path(__file__).parent.glob("_kernels*") if path.suffix in SUFFIXES)
    wrong = "not built: reinstall formwright where a C++17 compiler is found"
    for path in files:
        try:
            found = ctypes.CDLL(str(path))
            for newest in (
                "formwright_row_dots",
                "formwright_iceformer",
                "formwright_window_forward",
            ):  # no older library
                found[newest]
            found.formwright_instruction_set.restype = ctypes.c_char_p
            return found, f"in use, {found.formwright_instruction_set().decode()}"
        except (OSError, AttributeError) as fault:
            wrong = f"not usable, reinstall formwright: {fault}"
    return None, wrong


def function(name: str, *, tensors: int, numbers: int) -> Callable[..., int] | None:
    """A kernel of so many data pointers and then so many 64-bit integers, plain ints all; none without the library."""
    found = library()
    if found is None:
        return None
    kernel = found[name]
    kernel.argtypes, kernel.restype = [ctypes.c_void_p] * tensors + [ctypes.c_int64] * numbers, ctypes.c_int64
    return kernel


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or none."""
    return _load()[0]


def describe() -> str:
    """Whether the kernels are in use, with which instruction set, or why not."""
    return _load()[1]
