"""sharedvector: a pool of slots, one per tensor and message in flight; a slot is pinned while a consumer views it.

The pool is made for data loading: it holds one dtype, knows the shape of what is in each slot, and consumers pick the
slots. Here the message names them.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sharedvector import SharedVector, remove_shared_memory  # type: ignore[import-not-found, unused-ignore]

from . import interface

__all__ = ["Consumer", "Producer"]

# Boost's bookkeeping in the segment, beside the slots.
_OVERHEAD, _OVERHEAD_PER_SLOT = 1 << 20, 4 << 10


class Producer(interface.Producer):
    """Replaces what is in the slots."""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        # All slots are as large as the largest tensor.
        slot, slots = max(plan.sizes), plan.in_flight * len(plan.sizes)
        room = slots * (slot + _OVERHEAD_PER_SLOT) + _OVERHEAD
        self._pool = SharedVector(plan.name, chunk_size=slot, max_memory_size=room, dtype="float32")
        for size in plan.sizes * plan.in_flight:
            self._pool.append(np.zeros(size // 4, dtype=np.float32))
        self._unused = itertools.cycle(range(slots))

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """One copy per tensor; a slot that is still viewed is an error."""
        chosen = list(itertools.islice(self._unused, len(tensors)))
        for slot, tensor in zip(chosen, tensors, strict=True):
            self._pool.replace(slot, tensor.numpy())
        return [[pickle.dumps(chosen)]] * self.plan.consumers

    def close(self) -> None:
        """Unlink."""
        del self._pool
        remove_shared_memory(self.plan.name)


class Consumer(interface.Consumer):
    """Reads the slots that it is told; a view pins its slot until it is gone."""

    def __init__(self, plan: interface.Plan, handle: Any, index: int) -> None:
        super().__init__(plan, handle, index)
        self._pool = SharedVector(plan.name, create=False)

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Zero-copy views."""
        return [torch.from_numpy(self._pool.get(slot)) for slot in pickle.loads(frames[0])]

    def close(self) -> None:
        """Unmap."""
        del self._pool
