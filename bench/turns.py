"""Interleaved rounds: the transports take turns inside every round, and another one begins each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

__all__ = ["rotated"]

T = TypeVar("T")


def rotated(items: Sequence[T], turn: int) -> Iterator[T]:
    """All items, beginning with another one each turn; every second pass over the beginnings goes backwards.

    A plain rotation would let each item always follow the same one.
    """
    if not items:
        return
    passes, first = divmod(turn, len(items))
    ordered = [*items[first:], *items[:first]]
    yield from ordered if passes % 2 == 0 else [ordered[0], *reversed(ordered[1:])]
