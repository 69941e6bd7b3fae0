"""The three ways in which the demonstration moves the tensors of a request, behind one interface.

All of them send the same request object through the same sockets; they differ in what stands in it for a tensor.
"""

from __future__ import annotations

import pickle
from typing import Any, Protocol

import torch

import shmx

from .reference_segment import SegmentTensor

__all__ = ["TRANSPORTS", "Transport", "make_transport"]


class Transport(Protocol):
    """What a transport has to be able to do."""

    name: str

    def publish(self, tensors: list[torch.Tensor], serial: int) -> list[Any]:
        """Return what stands for each tensor in the request; runs in the producer."""

    def dumps(self, request: object, loads: int) -> bytes:
        """Pickle a request that will be unpickled `loads` times."""

    def abandon(self, published: list[Any]) -> None:
        """Give up what was published and may never be loaded; runs in the producer, when the run breaks off."""

    def own(self, items: list[Any]) -> tuple[list[Any], list[str | None]]:
        """Return tensors in private memory, and for each the reason if it is lost; runs once in every rank."""


class Shmx:
    """Handles of parts of a shared block."""

    name = "shmx"

    def publish(self, tensors: list[torch.Tensor], serial: int) -> list[Any]:
        """Copy the tensors into one block of the arena: they travel together."""
        return shmx.wrap(list(tensors), min_bytes=0)

    def dumps(self, request: object, loads: int) -> bytes:
        """Announce every load, so that the data outlives them all, whichever rank is last."""
        with shmx.readers(loads):
            return pickle.dumps(request)

    def abandon(self, published: list[Any]) -> None:
        """Revoke the block: a rank that was killed may leave an announced load behind."""
        published[0].revoke()

    def own(self, items: list[Any]) -> tuple[list[Any], list[str | None]]:
        """Copy out of the arena; the block is free when every rank has done so."""
        tensors, errors = shmx.unwrap(items, on_error="return")
        return tensors, [type(error).__name__ if error else None for error in errors]


class Inline:
    """The tensors themselves, in the pickle."""

    name = "inline"

    def publish(self, tensors: list[torch.Tensor], serial: int) -> list[Any]:
        """Nothing to do: pickling is what copies."""
        return tensors

    def dumps(self, request: object, loads: int) -> bytes:
        """Pickle the bytes of all tensors."""
        return pickle.dumps(request)

    def abandon(self, published: list[Any]) -> None:
        """Nothing to give back."""

    def own(self, items: list[Any]) -> tuple[list[Any], list[str | None]]:
        """Nothing to do: unpickling has made private tensors."""
        return items, [None] * len(items)


class Segment(Inline):
    """One fresh segment per tensor and message, see `bench.reference_segment`."""

    name = "segment"

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def publish(self, tensors: list[torch.Tensor], serial: int) -> list[Any]:
        """Make a segment for every tensor; the first rank that materializes it removes its name."""
        return [SegmentTensor(tensor, name=f"{self._prefix}{serial}_{i}") for i, tensor in enumerate(tensors)]

    def own(self, items: list[Any]) -> tuple[list[Any], list[str | None]]:
        """Clone, close, unlink."""
        errors: list[str | None] = [None] * len(items)
        for i, item in enumerate(items):
            try:
                items[i] = item.materialize()
            # Any failure is a loss.
            except Exception as error:
                errors[i] = type(error).__name__
        return items, errors


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
