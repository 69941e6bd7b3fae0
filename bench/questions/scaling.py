"""How does the cost grow with sizes, tensors, consumers, blocks and processes?

One table each, with the slope of a straight line through the logarithms of the medians: 0 is a constant cost, 1 one
that grows in proportion.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch

import shmx
from shmx import _core

from ..contenders import clock
from ..options import Options
from ..process_tree import MeasurementError
from ..report import Check, Report, Table, paired_ratio, size_text
from ..turns import rotated
from ..worker import Worker

__all__ = ["measure", "slope"]

SIZES = (64, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 128 << 20)
COUNTS = (1, 10, 32, 100, 1000)
REQUEST_BYTES = 32_000_000
CONSUMERS = (1, 2, 4, 8)
BLOCKS = (10, 100, 1000, 10_000, 100_000)
PROCESSES = (1, 2, 4, 8, 16, 32, 64)
SMALL = 4 << 10
REPEATS = 200
# "Does not depend on": what single cells of one run differ by on a busy machine.
SAME = 1.25


def slope(table: Table, row: str, sizes: Sequence[float]) -> float:
    """Least-squares slope of log(median) over log(size); `sizes` in the order of the columns."""
    points = [
        (math.log(size), math.log(table.median(row, column)))
        for size, column in zip(sizes, table.columns(), strict=True)
        if table.median(row, column) > 0
    ]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread: float = sum((x - mean_x) ** 2 for x, _ in points)
    together: float = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return together / spread


def _say_slopes(table: Table, sizes: Sequence[float], cause: str) -> Table:
    slopes = ", ".join(f"{row} {slope(table, row, sizes):+.2f}" for row in table.samples)
    table.notes = [f"Slopes: {slopes}. {cause}"]
    return table


def _in_turns(
    table: Table,
    column_of: Callable[[Any], str],
    cases: Sequence[Any],
    rounds: int,
    run: Callable[[Any], Mapping[str, float]],
) -> None:
    """Every case once a round; `run(case)` gives one sample for each row."""
    for turn in range(-1, rounds):
        for case in rotated(cases, turn):
            samples = run(case)
            if turn >= 0:
                for row, sample in samples.items():
                    table.add(row, column_of(case), sample)


class _Consumer:
    """Loads and views the tensors of a pickle."""

    def consume(self, blob: bytes, expected: Sequence[int]) -> dict[str, float]:
        start = time.perf_counter_ns()
        handles = pickle.loads(blob)
        loaded = time.perf_counter_ns()
        views = [handle.view() for handle in handles]
        viewed = time.perf_counter_ns()
        if [int(view[0]) for view in views] != list(expected):
            raise MeasurementError("a view shows other bytes than were shared")
        views.clear()
        released = clock(lambda: [handle.release() for handle in handles])
        return {"loads": (loaded - start) / 1e3, "view": (viewed - loaded) / 1e3, "release": released}


def _message(
    arena: shmx.Arena, tensors: Sequence[torch.Tensor], readers: int, *, together: bool = False
) -> tuple[bytes, list[int], dict[str, float]]:
    """Publish tensors; the pickle, the first byte of each, and what it has cost in microseconds."""
    start = time.perf_counter_ns()
    handles = arena.share_many(tensors) if together else [arena.share(tensor) for tensor in tensors]
    shared = time.perf_counter_ns()
    with shmx.readers(readers):
        blob = pickle.dumps(handles)
    pickled = time.perf_counter_ns()
    for handle in handles:
        handle.release()
    return blob, [int(t[0]) for t in tensors], {"share": (shared - start) / 1e3, "dumps": (pickled - shared) / 1e3}


def _random(size: int) -> torch.Tensor:
    return torch.randint(0, 255, (size,), dtype=torch.uint8)


def _tensor_size(rounds: int, sizes: Sequence[int]) -> Table:
    table = Table("Size of the tensor", "us")
    with shmx.Arena(capacity=8 * max(sizes) + (64 << 20)) as arena, Worker(_Consumer) as consumer:
        sources = {size: _random(size) for size in sizes}
        placed = {size: arena.empty(size, dtype=torch.uint8) for size in sizes}

        def run(size: int) -> dict[str, float]:
            in_place = median(clock(lambda: arena.share(placed[size])) for _ in range(9))
            # The second message: the case before this one has used the caches.
            for _ in range(2):
                blob, expected, costs = _message(arena, [sources[size]], 1)
                costs.update(consumer.call("consume", blob, expected))
            return {"share, `empty` tensor": in_place, **costs}

        _in_turns(table, size_text, sizes, rounds, run)
        placed.clear()
    return _say_slopes(
        table,
        sizes,
        "Only share copies; everything else handles descriptions of a fixed size. The slope of share is below 1: the "
        "smallest sizes cost only the call.",
    )


def _tensors_per_request(rounds: int, counts: Sequence[int], total: int) -> tuple[Table, Table]:
    table = Table(f"Tensors of a request of {total / 1e6:.0f} MB", "us")
    wire = Table("The pickle of such a request", "bytes")
    turns = itertools.count()
    with shmx.Arena(capacity=16 * total + (64 << 20)) as arena, Worker(_Consumer) as consumer:
        sources = {count: [_random(total // count) for _ in range(count)] for count in counts}

        def run(count: int) -> dict[str, float]:
            costs: dict[bool, dict[str, float]] = {}
            for together in rotated((False, True), next(turns)):
                for _ in range(2):
                    blob, expected, costs[together] = _message(arena, sources[count], 1, together=together)
                    costs[together].update(consumer.call("consume", blob, expected))
                # The same in every round.
                wire.samples.setdefault(_way(together), {})[str(count)] = [len(blob)]
            return {f"{step}, {_way(way)}": costs[way][step] for way in (False, True) for step in costs[way]}

        _in_turns(table, str, counts, rounds, run)
    # In order, not as the rounds have met them.
    wire.samples = {
        way: {str(count): wire.samples[way][str(count)] for count in counts} for way in map(_way, (False, True))
    }
    return _say_slopes(
        table,
        counts,
        "Handles of their own are pickled and loaded one by one; with `share_many` one handle of the block travels, "
        "and a description of each tensor. Either copies the same bytes however they are cut, but pieces below the "
        f"threshold of non-temporal stores ({size_text(_core.non_temporal_thresholds()['cold'])} here) go through the "
        "cache, and at the largest numbers the calls show.",
    ), wire


def _way(together: bool) -> str:
    return "share_many" if together else "share each"


def _consumers(rounds: int, counts: Sequence[int]) -> Table:
    table = Table("Consumers of one tensor of 4 KiB", "us")
    with shmx.Arena(capacity=64 << 20) as arena, ExitStack() as processes:
        consumers = [processes.enter_context(Worker(_Consumer)) for _ in range(max(counts))]
        source = _random(SMALL)

        def run(count: int) -> dict[str, float]:
            blob, expected, costs = _message(arena, [source], count)
            start = time.perf_counter_ns()
            for consumer in consumers[:count]:
                consumer.send("consume", blob, expected)
            answers = [consumer.receive() for consumer in consumers[:count]]
            costs["all have answered"] = (time.perf_counter_ns() - start) / 1e3
            costs["loads, median consumer"] = median(answer["loads"] for answer in answers)
            return costs

        _in_turns(table, str, counts, rounds, run)
    return _say_slopes(
        table,
        counts,
        "A count of readers is a number in one cell, so the producer pays the same for any; the answers are pipe "
        "messages to and from each consumer on the cores there are.",
    )


def _small_cycles(arena: shmx.Arena, source: torch.Tensor) -> dict[str, float]:
    """Median costs in microseconds of a small tensor that is shared, sent to this process itself and given back."""
    samples: dict[str, list[float]] = {"share": [], "dumps + loads": [], "release": []}
    for _ in range(REPEATS):
        start = time.perf_counter_ns()
        handle = arena.share(source)
        shared = time.perf_counter_ns()
        with shmx.readers(1):
            pickled = time.perf_counter_ns()
            loaded = pickle.loads(pickle.dumps(handle))
            done = time.perf_counter_ns()
        if not torch.equal(loaded.view(), source):
            raise MeasurementError("a view shows other bytes than were shared")
        loaded.release()
        samples["share"].append((shared - start) / 1e3)
        samples["dumps + loads"].append((done - pickled) / 1e3)
        samples["release"].append(clock(handle.release))
    return {row: median(values) for row, values in samples.items()}


def _blocks(rounds: int, counts: Sequence[int], kind: str) -> Table:
    table = Table(f"Blocks of 4 KiB in the arena, all {kind}", "us")
    source = _random(SMALL)
    for turn in range(-1, rounds):
        with shmx.Arena(capacity=2 * SMALL * max(counts) + (64 << 20)) as arena:
            kept: list[Any] = []
            for count in counts:
                while len(kept) < count:
                    handle = arena.share(source)
                    with shmx.readers(1):
                        kept.append(handle if kind == "held" else pickle.dumps(handle))
                costs = _small_cycles(arena, source)
                more: list[Any] = []
                # A block of its own for each: what is idle is not enough.
                costs["share, kept"] = median(
                    clock(lambda more=more: more.append(arena.share(source)))  # type: ignore[misc]
                    for _ in range(REPEATS)
                )
                more.clear()
                if turn >= 0:
                    for row, cost in costs.items():
                        table.add(row, str(count), cost)
            if kind != "held":
                for blob in kept:
                    shmx.discard(blob)
            kept.clear()
    return _say_slopes(
        table,
        counts,
        "An allocation looks at no more than nine blocks of its size before it takes free bytes from an ordered tree; "
        "a load finds its block by its index.",
    )


class _Crowd:
    """An arena's owner that forks processes which stay attached and do nothing."""

    def __init__(self) -> None:
        self._arena = shmx.Arena(capacity=64 << 20)
        self._source = _random(SMALL)
        # A child holds what it inherits, so this block tells how many are attached.
        self._inherited = self._arena.share(self._source)
        self._children: list[tuple[int, int]] = []

    def grow(self, processes: int) -> int:
        """Fork until there are so many processes; the number that hold the inherited block."""
        while 1 + len(self._children) < processes:
            wait, release = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(release)
                # Each ends when the parent closes its pipe, or dies: no other child may keep that end open.
                for _, other in self._children:
                    os.close(other)
                os.read(wait, 1)
                os._exit(0)
            os.close(wait)
            self._children.append((child, release))
        return int(self._arena.stats()["holders"])

    def cost(self) -> dict[str, float]:
        return _small_cycles(self._arena, self._source)

    def shrink(self) -> None:
        for child, release in self._children:
            os.close(release)
            os.waitpid(child, 0)
        self._children.clear()
        self._arena.sweep()


def _processes(rounds: int, counts: Sequence[int]) -> Table:
    table = Table("Processes attached to the arena", "us")
    with Worker(_Crowd) as crowd:
        for turn in range(-1, rounds):
            for count in counts:
                if crowd.call("grow", count) != count:
                    raise MeasurementError(f"not all of {count} processes are attached")
                for row, sample in crowd.call("cost").items():
                    if turn >= 0:
                        table.add(row, str(count), sample)
            crowd.call("shrink")
    return _say_slopes(
        table,
        counts,
        "A process is one bit of a block's word; who is alive is asked only before the arena grows.",
    )


def measure(options: Options) -> Report:
    """Measure all tables; raises ``MeasurementError`` if a view showed other bytes than were shared."""
    quick = options.quick
    rounds = options.rounds_or(15)
    blocks = BLOCKS[:3] if quick else BLOCKS
    few = min(rounds, 7)
    held, announced = (_blocks(few, blocks, kind) for kind in ("held", "announced"))
    tables = [
        _tensor_size(rounds, SIZES[:4] if quick else SIZES),
        *_tensors_per_request(rounds, COUNTS[:3] if quick else COUNTS, REQUEST_BYTES // (16 if quick else 1)),
        _consumers(rounds, CONSUMERS[:2] if quick else CONSUMERS),
        held,
        announced,
        _processes(few, PROCESSES[:3] if quick else PROCESSES),
    ]
    checks = []
    for table, what in ((held, "held blocks"), (announced, "announced blocks"), (tables[-1], "processes")):
        first, *_, last = table.columns()
        for row in ("share", "dumps + loads"):
            ratio = paired_ratio(table.samples[row][last], table.samples[row][first])
            checks.append(
                Check(f"{row} of 4 KiB, {last} / {first} {what}", ratio, f"<= {SAME}", ratio <= SAME),
            )
    return Report("scaling", tables, checks, ["Of all repetitions of a case in one round the median is one sample."])
