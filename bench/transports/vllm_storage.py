"""vLLM's ``SingleWriterShmObjectStorage`` over its ring buffer, with its own serializer. It copies out, no views.

The ring has room for the messages in flight and two more, so that wrapping round never stops it.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch

from . import interface
from .vllm_modules import object_storage

__all__ = ["Consumer", "Producer"]

_SLACK = 4096


class Producer(interface.Producer):
    """One object per tensor."""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        module = object_storage()
        room = (sum(plan.sizes) + _SLACK * len(plan.sizes)) * (plan.in_flight + 2)
        self._ring = module.SingleWriterShmRingBuffer(room, create=True)
        self._storage = module.SingleWriterShmObjectStorage(max(plan.sizes) + _SLACK, plan.consumers, self._ring)
        self._serial = 0

    def handle(self) -> Any:
        """Sizes and the name of the ring."""
        return self._storage.max_object_size, self._ring.handle()

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """Store each tensor under a key of its own."""
        stubs = []
        for tensor in tensors:
            self._serial += 1
            key = str(self._serial)
            address, number = self._storage.put(key, tensor)
            stubs.append((address, number, self._storage.get_signature(key), key))
        return [[pickle.dumps(stubs)]] * self.plan.consumers

    def close(self) -> None:
        """Unlink the ring."""
        self._storage.close()


class Consumer(interface.Consumer):
    """Reads objects; reading is what counts a reader as done."""

    def __init__(self, plan: interface.Plan, handle: Any, index: int) -> None:
        super().__init__(plan, handle, index)
        module = object_storage()
        max_object_size, ring = handle
        self._storage = module.SingleWriterShmObjectStorage(
            max_object_size, plan.consumers, module.SingleWriterShmRingBuffer(*ring), reader_lock=plan.lock
        )

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Copies: the storage gives nothing else."""
        return [self._storage.get(*stub) for stub in pickle.loads(frames[0])]

    def own(self, frames: interface.Frames) -> list[torch.Tensor]:
        """As `open`."""
        return self.open(frames)

    def close(self) -> None:
        """Unmap."""
        self._storage.close()
