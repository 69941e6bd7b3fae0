"""Contenders that take turns: every one runs once in each round, and who begins changes from round to round.

So a slow second of the machine hits all of them alike, and nobody always runs after the same neighbour.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .report import Table

__all__ = ["Contender", "clock", "rotated", "take_turns"]

T = TypeVar("T")


@dataclass(frozen=True)
class Contender:
    """A cell of a table and what gives one sample for it."""

    table: Table
    row: str
    column: str
    run: Callable[[], float]


def clock(operation: Callable[[], object]) -> float:
    """Microseconds of one call. What it returns is dropped after the clock was read."""
    start = time.perf_counter_ns()
    result = operation()
    elapsed = time.perf_counter_ns() - start
    del result
    return elapsed / 1e3


def rotated(contenders: Sequence[T], turn: int) -> list[T]:
    """The contenders in the order of round `turn`."""
    first = turn % len(contenders) if contenders else 0
    return [*contenders[first:], *contenders[:first]]


def take_turns(contenders: Sequence[Contender], rounds: int, warm_up: int = 2) -> None:
    """Run every contender once a round; its samples go to its cell, those of the warm-up rounds nowhere."""
    for turn in range(-warm_up, rounds):
        for contender in rotated(contenders, turn):
            sample = contender.run()
            if turn >= 0:
                contender.table.add(contender.row, contender.column, sample)
