"""pyshmem: a named stream per tensor and message in flight; acknowledgements say when a stream may be written again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyshmem
import torch

from . import interface

__all__ = ["Consumer", "Producer"]


def _names(plan: interface.Plan) -> list[list[str]]:
    """Stream names, by message in flight and tensor."""
    return [[f"{plan.name}-{turn}-{i}" for i in range(len(plan.sizes))] for turn in range(plan.in_flight)]


class Producer(interface.Producer):
    """Writes each tensor into its stream."""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        self._sets = [
            [
                pyshmem.create(name, shape=(size // 4,), dtype=np.float32)
                for name, size in zip(names, plan.sizes, strict=True)
            ]
            for names in _names(plan)
        ]
        self._turns = itertools.cycle(self._sets)

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """One memcpy per tensor, by NumPy."""
        for stream, tensor in zip(next(self._turns), tensors, strict=True):
            stream.write(tensor.numpy())
        return [[b""]] * self.plan.consumers

    def close(self) -> None:
        """Unlink."""
        for stream in itertools.chain.from_iterable(self._sets):
            stream.unlink()


class Consumer(interface.Consumer):
    """Reads the streams in the same order."""

    def __init__(self, plan: interface.Plan, handle: Any, index: int) -> None:
        super().__init__(plan, handle, index)
        self._sets = [[pyshmem.open(name) for name in names] for names in _names(plan)]
        self._turns = itertools.cycle(range(plan.in_flight))
        # Recycled destinations, the fastest way that `read` offers; faulted in here.
        self._owned = [[np.zeros(size // 4, dtype=np.float32) for size in plan.sizes] for _ in self._sets]

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Views. The lock is held only to get them: nobody writes before the acknowledgement."""
        views = []
        for stream in self._sets[next(self._turns)]:
            with stream.locked():
                views.append(torch.from_numpy(stream.read(safe=False)))
        return views

    def own(self, frames: interface.Frames) -> list[torch.Tensor]:
        """One memcpy per tensor into recycled arrays."""
        turn = next(self._turns)
        pairs = zip(self._sets[turn], self._owned[turn], strict=True)
        return [torch.from_numpy(stream.read(out=array)) for stream, array in pairs]

    def close(self) -> None:
        """Unmap."""
        for stream in itertools.chain.from_iterable(self._sets):
            stream.close()
