"""What the two sharing strategies of torch.multiprocessing have in common: fresh shared memory for every tensor."""

from __future__ import annotations

import io
import pickle
from collections import deque
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

from . import interface

__all__ = ["Consumer", "Producer"]


class Producer(interface.Producer):
    """Copies into new shared storages; keeps them until they are acknowledged, as torch requires."""

    strategy = ""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        self._messages: deque[list[torch.Tensor]] = deque()

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """One copy each. Every pickle can be loaded once, so each consumer gets its own."""
        torch.multiprocessing.set_sharing_strategy(self.strategy)  # type: ignore[no-untyped-call]
        shared = []
        for tensor in tensors:
            storage = torch.UntypedStorage._new_shared(tensor.nbytes)  # type: ignore[no-untyped-call]
            copy = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
            shared.append(copy.copy_(tensor))
        self._messages.append(shared)
        return [[_dumps(shared)] for _ in range(self.plan.consumers)]

    def recycle(self) -> None:
        """Let go of the storages."""
        self._messages.popleft()


class Consumer(interface.Consumer):
    """Unpickling maps."""

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Views of the shared storages."""
        tensors: list[torch.Tensor] = pickle.loads(frames[0])
        return tensors


def _dumps(tensors: list[torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(tensors)
    return buffer.getvalue()
