"""Contenders of one process that take turns: every one runs once a round, and its samples go to its cell of a table.

So a slow second of the machine hits all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .report import Table
from .turns import rotated

__all__ = ["Contender", "clock", "take_turns"]


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


def take_turns(contenders: Sequence[Contender], rounds: int, warm_up: int = 2) -> None:
    """Run every contender once a round; its samples go to its cell, those of the warm-up rounds nowhere."""
    for turn in range(-warm_up, rounds):
        for contender in rotated(contenders, turn):
            sample = contender.run()
            if turn >= 0:
                contender.table.add(contender.row, contender.column, sample)
