"""vLLM's ``ShmTensorArena``: slots of one size, a flag per reader and slot.

vLLM itself sends tensors below 8 MiB another way and has 8 slots of 256 MiB. Here every tensor goes through the arena,
and there are as many slots, each as large as the largest tensor, as the messages in flight need and one message more.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch

from . import interface
from .vllm_modules import tensor_arena

__all__ = ["Consumer", "Producer"]


class Producer(interface.Producer):
    """Copies each tensor into a slot."""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        slots = len(plan.sizes) * (plan.in_flight + 1)
        self._arena = tensor_arena().ShmTensorArena(plan.consumers, slot_bytes=max(plan.sizes), n_slots=slots)

    def handle(self) -> Any:
        """What a reader attaches by."""
        return self._arena.handle()

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """Send slot, bytes, type and shape of each, as vLLM's pickler does."""
        stubs = []
        for tensor in tensors:
            slot = self._arena.write_tensor(tensor)
            if slot is None:
                raise RuntimeError("no free slot")
            stubs.append((slot, tensor.nbytes, tensor.dtype, tuple(tensor.shape)))
        return [[pickle.dumps(stubs)]] * self.plan.consumers

    def close(self) -> None:
        """The arena unlinks when it is collected."""
        del self._arena


class Consumer(interface.Consumer):
    """Views of slots; a slot is given back when its tensor is gone and releases are flushed."""

    def __init__(self, plan: interface.Plan, handle: Any, index: int) -> None:
        super().__init__(plan, handle, index)
        self._arena = tensor_arena().ShmTensorArena(*handle, reader_rank=index)

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Zero-copy views."""
        return [self._arena.get_tensor(*stub) for stub in pickle.loads(frames[0])]

    def done(self) -> None:
        """What vLLM does at the next dequeue."""
        self._arena.flush_releases()

    def close(self) -> None:
        """The mapping goes with the arena."""
        del self._arena
