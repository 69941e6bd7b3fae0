"""Handles of blocks in an arena, one block for the tensors of a message; every load is announced."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

import shmx

from . import interface

__all__ = ["Consumer", "Producer"]


class Producer(interface.Producer):
    """Shares, announces, lets go at once: announced loads keep the block."""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        self._arena = shmx.Arena()

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """Copy in; one handle travels as its bytes, several as a pickle."""
        consumers = self.plan.consumers
        if len(tensors) == 1:
            return [[self._arena.share(tensors[0]).to_bytes(readers=consumers)]] * consumers
        handles = self._arena.share_many(tensors)
        with shmx.readers(consumers):
            blob = pickle.dumps(handles)
        for handle in handles:
            handle.release()
        return [[blob]] * consumers

    def close(self) -> None:
        """The last one to leave an arena removes it."""
        self._arena.close()


class Consumer(interface.Consumer):
    """Loads, views or materializes, releases."""

    def __init__(self, plan: interface.Plan, handle: Any, index: int) -> None:
        super().__init__(plan, handle, index)
        self._held: deque[list[shmx.SharedTensor]] = deque()

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Zero-copy views."""
        return [handle.view() for handle in self._load(frames[0])]

    def own(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Copies into recycled private memory."""
        return [handle.materialize() for handle in self._load(frames[0])]

    def _load(self, blob: bytes) -> list[shmx.SharedTensor]:
        handles = [shmx.SharedTensor.from_bytes(blob)] if len(self.plan.sizes) == 1 else pickle.loads(blob)
        self._held.append(handles)
        return handles

    def done(self) -> None:
        """Give the block back."""
        for handle in self._held.popleft():
            handle.release()
