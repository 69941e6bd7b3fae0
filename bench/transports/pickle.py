"""The tensors themselves in the pickle: what sending them without further thought does."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import cast

import torch

from . import interface

__all__ = ["Consumer", "Producer"]


class Producer(interface.Producer):
    """Pickles once, sends the bytes to each consumer."""

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """Pickle the bytes of all tensors."""
        return [[pickle.dumps(list(tensors), pickle.HIGHEST_PROTOCOL)]] * self.plan.consumers


class Consumer(interface.Consumer):
    """Unpickles; the result is private memory."""

    bulk = True

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """There is nothing to view, only tensors of one's own."""
        return cast("list[torch.Tensor]", pickle.loads(frames[0]))

    def own(self, frames: interface.Frames) -> list[torch.Tensor]:
        """As `open`."""
        return self.open(frames)
