"""The C library's heap. Between steps it gives freed memory back, and asks for it again at once: the system clears each page
that it hands out, which on a CPU takes a few hundredths of a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

TRIM, MMAP = -1, -3
"""glibc's names for two settings: how many free bytes at the heap's end, and blocks of how many bytes, go back at once."""
EVERYTHING = 2**30
USUAL = {TRIM: 2**26, MMAP: 2**25}
"""Where glibc itself comes to, once blocks of that size have been freed."""


@cache
def _glibc() -> ctypes.CDLL | None:
    """None on systems with another C library, which keep their own ways."""
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except OSError:
        return None


@contextmanager
def kept() -> Iterator[None]:
    """Inside, freed memory stays with this process; at the end, all that is free goes back to the system."""
    library = _glibc()
    if library:
        for setting in USUAL:
            library.mallopt(setting, EVERYTHING)
    try:
        yield
    finally:
        if library:
            for setting, size in USUAL.items():
                library.mallopt(setting, size)
            library.malloc_trim(0)
