"""Pickle protocol 5 with the tensors out of band, one ZMQ frame each: no copy but those of the socket."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import torch

from . import interface

__all__ = ["Consumer", "Producer"]


class Producer(interface.Producer):
    """Sends from the memory of the tensors, which lie still until the consumers have answered."""

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """Pickle only shapes and types."""
        buffers: list[pickle.PickleBuffer] = []
        blob = pickle.dumps([tensor.numpy() for tensor in tensors], protocol=5, buffer_callback=buffers.append)
        return [[blob, *(buffer.raw() for buffer in buffers)]] * self.plan.consumers


class Consumer(interface.Consumer):
    """Tensors over the memory that ZMQ has received into, which is private and writable."""

    bulk = True

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """No copy after that of the socket."""
        arrays: list[np.ndarray] = pickle.loads(frames[0], buffers=frames[1:])
        return [torch.from_numpy(array) for array in arrays]

    def own(self, frames: interface.Frames) -> list[torch.Tensor]:
        """As `open`."""
        return self.open(frames)
