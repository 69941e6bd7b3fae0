"""One fresh segment per tensor and message, as in SGLang #21465; here the producer unlinks after all acknowledgements.

The class itself lets the first consumer unlink, which loses data when there are several. The question `broadcast`
counts that.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from ..reference_segment import SegmentTensor
from . import interface

__all__ = ["Consumer", "Producer"]


class Producer(interface.Producer):
    """Makes segments, removes them when they have been read."""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        self._serial = 0
        self._messages: deque[list[SegmentTensor]] = deque()

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """Copy each tensor into a segment of its own."""
        self._serial += 1
        name = f"psm_{self.plan.name}_{self._serial}"
        self._messages.append([SegmentTensor(tensor, name=f"{name}_{i}") for i, tensor in enumerate(tensors)])
        return [[pickle.dumps(self._messages[-1])]] * self.plan.consumers

    def recycle(self) -> None:
        """Unlink."""
        for segment in self._messages.popleft():
            segment.unlink()

    def close(self) -> None:
        """Unlink what was never acknowledged."""
        while self._messages:
            self.recycle()


class Consumer(interface.Consumer):
    """Maps every segment anew."""

    def __init__(self, plan: interface.Plan, handle: Any, index: int) -> None:
        super().__init__(plan, handle, index)
        self._opened: deque[list[SegmentTensor]] = deque()

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Views of the segments; their pages are mapped when they are read."""
        self._opened.append(pickle.loads(frames[0]))
        return [segment.view() for segment in self._opened[-1]]

    def done(self) -> None:
        """Unmap."""
        for segment in self._opened.popleft():
            segment.close()
