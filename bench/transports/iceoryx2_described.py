"""iceoryx2 where the consumers do not know beforehand what a message holds: types, shapes and places go with it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import torch

from . import iceoryx2, interface

__all__ = ["Consumer", "Producer"]


class Producer(iceoryx2.Producer):
    """Sends the description over ZMQ, as shmx sends its handles."""

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """As the base, and one small pickle."""
        super().put(tensors)
        described = [
            (tensor.dtype, tuple(tensor.shape), offset) for tensor, offset in zip(tensors, self._offsets, strict=False)
        ]
        return [[pickle.dumps(described)]] * self.plan.consumers


class Consumer(iceoryx2.Consumer):
    """Makes the tensors that it is told."""

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Zero-copy views."""
        payload = self._receive()
        views = []
        for dtype, shape, offset in pickle.loads(frames[0]):
            flat = torch.frombuffer(payload, dtype=dtype, count=math.prod(shape), offset=offset)
            views.append(flat.view(shape))
        return views
