"""The three ways in which the demonstration moves the tensors of a request, behind one interface.

All of them send the same request object through the same sockets; they differ in what stands in it for a tensor.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Sequence
from typing import Any, Protocol

import torch

import shmx

from .reference_segment import SegmentTensor

__all__ = ["TRANSPORTS", "Transport", "make_transport"]


class Transport(Protocol):
    """What a transport has to be able to do."""

    name: str

    def publish(self, tensors: Sequence[torch.Tensor], serial: int) -> list[Any]:
        """Return what stands for each tensor in the request; runs in the producer."""

    def dumps(self, request: object, loads: int) -> bytes:
        """Pickle a request that will be unpickled `loads` times."""

    def sent(self, published: Sequence[Any]) -> None:
        """Let go of what `publish` returned: the producer has sent it and has no more use for it."""

    def abandon(self, blob: bytes) -> None:
        """Give up a message that may never be loaded; runs in the process that sent it, when the run breaks off."""

    def own(self, item: Any) -> torch.Tensor:
        """Return a tensor in private memory; runs once in every rank."""


class Shmx:
    """Handles of parts of a shared block."""

    name = "shmx"

    def publish(self, tensors: Sequence[torch.Tensor], serial: int) -> list[Any]:
        """Copy the tensors into one block of the arena: they travel together."""
        return shmx.share_many(tensors)

    def dumps(self, request: object, loads: int) -> bytes:
        """Announce every load, so that the data outlives them all, whichever rank is last."""
        with shmx.readers(loads):
            return pickle.dumps(request)

    def sent(self, published: Sequence[Any]) -> None:
        """Release at once: what was announced keeps the block."""
        for handle in published:
            handle.release()

    def abandon(self, blob: bytes) -> None:
        """Take back what was announced; copies that are under way end undisturbed."""
        shmx.discard(blob)
        for handle in pickle.loads(blob).pixel_values:
            # A rank that was killed may leave an announced load of the broadcast. The producer alone can revoke.
            with contextlib.suppress(shmx.ShmxError):
                handle.revoke()

    def own(self, item: Any) -> torch.Tensor:
        """Copy out of the arena; the block is free when every tensor of it has been given back."""
        try:
            tensor: torch.Tensor = item.materialize()
            return tensor
        finally:
            item.release()


class Inline:
    """The tensors themselves, in the pickle."""

    name = "inline"

    def publish(self, tensors: Sequence[torch.Tensor], serial: int) -> list[Any]:
        """Nothing to do: pickling is what copies."""
        return list(tensors)

    def dumps(self, request: object, loads: int) -> bytes:
        """Pickle the bytes of all tensors."""
        return pickle.dumps(request)

    def sent(self, published: Sequence[Any]) -> None:
        """Nothing to give back."""

    def abandon(self, blob: bytes) -> None:
        """Nothing to give back."""

    def own(self, item: Any) -> torch.Tensor:
        """Nothing to do: unpickling has made private tensors."""
        tensor: torch.Tensor = item
        return tensor


class Segment:
    """One fresh segment per tensor and message, see `bench.reference_segment`."""

    name = "segment"

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def publish(self, tensors: Sequence[torch.Tensor], serial: int) -> list[Any]:
        """Make a segment for every tensor."""
        return [SegmentTensor(tensor, name=f"{self._prefix}{serial}_{i}") for i, tensor in enumerate(tensors)]

    def dumps(self, request: object, loads: int) -> bytes:
        """Pickle names; the class has no place for the number of readers."""
        return pickle.dumps(request)

    def sent(self, published: Sequence[Any]) -> None:
        """Nothing to give back: the first rank that materializes removes the name."""

    def abandon(self, blob: bytes) -> None:
        """Nothing to do: the parent removes all segments of the run."""

    def own(self, item: Any) -> torch.Tensor:
        """Clone, close, unlink."""
        tensor: torch.Tensor = item.materialize()
        return tensor


TRANSPORTS = ("shmx", "inline", "segment")


def make_transport(name: str, *, segment_prefix: str) -> Transport:
    """Return the transport of that name.

    Parameters
    ----------
    name : str
        One of ``TRANSPORTS``.
    segment_prefix : str
        What the names of the segments of the reference begin with.

    Raises
    ------
    ValueError
        If there is no such transport.
    """
    if name == Shmx.name:
        return Shmx()
    if name == Inline.name:
        return Inline()
    if name == Segment.name:
        return Segment(segment_prefix)
    raise ValueError(f"no transport {name!r}; choose from {', '.join(TRANSPORTS)}")
