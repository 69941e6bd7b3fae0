"""Fixes how glibc's malloc hands large blocks out, because its own adjustment swings the cost of a copy fivefold.

A fresh block has to be faulted in page by page, a recycled one does not. glibc moves its thresholds while a program
runs, so that which of the two a ``clone()`` gets depends on what was freed before, also by other transports.
"""

from __future__ import annotations

import ctypes

__all__ = ["POLICIES", "apply"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# glibc takes no more than half of HEAP_MAX_SIZE.
_MMAP_THRESHOLD = 32 << 20
_NEVER = (1 << 31) - 1

POLICIES = {
    "settled": "mmap threshold 32 MiB, trim threshold 64 MiB: where glibc's adjustment ends; from 32 MiB up, and "
    "wherever 64 MiB are free at the top, every copy is faulted in anew",
    "keep": "no mmap and no trimming: freed memory is used again without page faults",
    "glibc": "glibc's own adjustment",
}


def apply(policy: str) -> None:
    """Set the policy for this process.

    Raises
    ------
    ValueError
        There is no such policy.
    OSError
        The C library refused.
    """
    if policy not in POLICIES:
        raise ValueError(f"no malloc policy {policy!r}; choose from {', '.join(POLICIES)}")
    if policy == "glibc":
        return
    settings = {_M_MMAP_THRESHOLD: _MMAP_THRESHOLD, _M_TRIM_THRESHOLD: 2 * _MMAP_THRESHOLD}
    if policy == "keep":
        settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER}
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in settings.items():
        if not mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) failed")
