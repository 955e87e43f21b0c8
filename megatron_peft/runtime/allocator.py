"""What the C library of a CPU process does with memory that torch frees (glibc; elsewhere nothing is changed).

torch keeps no memory of its own on a CPU. glibc hands the end of its heap back to the system as soon as a few dozen MiB
of it are free, so that a step that frees its activations pays for every page of them anew in the next step: one part in
fifty of a LoRA step, more of full fine-tuning. The peak is the same either way.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_NEVER = 2**31 - 1  # bytes free at the end of the heap
_LARGEST = 2**25  # the most that glibc takes: larger blocks come from the system and go back to it
_SMALLEST = 2**16
_decided = False


def keep_freed_memory() -> None:
    """From now on freed memory stays with the process, unless `give_back_freed_memory` was called before."""
    _decide({_MMAP_THRESHOLD: _LARGEST, _TRIM_THRESHOLD: _NEVER})


def give_back_freed_memory() -> None:
    """From now on blocks of 64 KiB and more go back to the system when they are freed: what is held is what is used."""
    _decide({_MMAP_THRESHOLD: _SMALLEST})


def _decide(options: dict[int, int]) -> None:
    global _decided
    if _decided or not sys.platform.startswith("linux"):
        return
    _decided = True
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
