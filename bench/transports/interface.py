"""What a transport has to be able to do, and what it is told.

All transports are driven over the same ZMQ sockets by `exchange`. A message is a list of tensors; messages end in the
order in which they began, so `Producer.recycle` and `Consumer.done` always mean the oldest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Consumer", "Frames", "Plan", "Producer"]

Frames = Sequence[Any]
"""What travels over ZMQ to one consumer: bytes-like objects."""


@dataclass(frozen=True)
class Plan:
    """What both sides know beforehand, and size their pools by.

    Attributes
    ----------
    name
        Different for every pair of run and payload; usable in file names.
    consumers
        How many receive each message.
    sizes
        Bytes of each tensor of a message; all are one-dimensional float32.
    in_flight
        Messages that are not recycled yet, at most.
    lock
        A ``multiprocessing.Lock`` common to all processes of the run.
    """

    name: str
    consumers: int
    sizes: tuple[int, ...]
    in_flight: int
    lock: Any = None


class Producer:
    """The sending side. `put` is timed, the rest is not."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def handle(self) -> Any:
        """Something picklable that every `Consumer` is made with."""
        return None

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[Frames]:
        """Publish a message; returns what to send to each consumer."""
        raise NotImplementedError

    def recycle(self) -> None:
        """All consumers are done with the oldest message."""

    def close(self) -> None:
        """Leave nothing behind; all consumers are closed."""


class Consumer:
    """The receiving side. `open` and `own` are timed, the rest is not."""

    bulk = False
    """Whether the frames are large, so that pyzmq should not copy them."""

    def __init__(self, plan: Plan, handle: Any, index: int) -> None:
        self.plan = plan

    def open(self, frames: Frames) -> list[torch.Tensor]:
        """Tensors to read from, by whatever is the cheapest way."""
        raise NotImplementedError

    def own(self, frames: Frames) -> list[torch.Tensor]:
        """Tensors in private memory."""
        return [view.clone() for view in self.open(frames)]

    def done(self) -> None:
        """The tensors of the oldest message have been dropped."""

    def close(self) -> None:
        """Give up what `__init__` acquired."""
