"""Tensors whose content names the message they belong to, and pressure that overwrites whatever may be overwritten."""

from __future__ import annotations

import numpy as np
import torch

import shmx

BLOCK = 64 << 10
_STEP = np.uint64(0x9E3779B97F4A7C15)


def _words(seed: int, count: int) -> np.ndarray:
    start = np.uint64((seed * 0xBF58476D1CE4E5B9 + 1) % 2**64)
    return (np.arange(count, dtype=np.uint64) * _STEP + start).view(np.int64)


def pattern(seed: int, nbytes: int = BLOCK) -> torch.Tensor:
    """An int64 tensor of ``nbytes`` bytes; no two seeds agree in any element."""
    return torch.from_numpy(_words(seed, nbytes // 8))


def is_pattern(tensor: torch.Tensor, seed: int) -> bool:
    """Every element of ``tensor`` is that of ``pattern(seed, ...)``."""
    found = tensor.numpy()
    return bool(np.array_equal(found, _words(seed, found.size)))


def press(arena: shmx.Arena) -> int:
    """Fill all the room that the arena can find, let go of it, and answer how many blocks of BLOCK bytes it was.

    Every byte that may be reused has been overwritten afterwards.
    """
    held = []
    for size in (BLOCK, BLOCK // 16):
        filler = torch.from_numpy(np.full(size, 0xEE, dtype=np.uint8))
        while True:
            try:
                held.append(arena.share(filler))
            except shmx.ArenaFullError:
                break
    return sum(handle.nbytes == BLOCK for handle in held)


def small_arena(blocks: int = 16, **settings: float) -> shmx.Arena:
    """An arena with room for that many blocks of BLOCK bytes."""
    return shmx.Arena(capacity=blocks * BLOCK, segment_bytes=blocks * BLOCK, **settings)
