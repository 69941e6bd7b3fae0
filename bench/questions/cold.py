"""What does the first message cost, and what does an arena cost that grows or is full?

First messages are measured in processes that have imported shmx and done nothing with it. Beside them: a fresh
`multiprocessing.shared_memory` segment for each tensor. Then a producer that must grow while it serves, beside one
that has reserved what it will need, and one that works at its capacity.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from multiprocessing.shared_memory import SharedMemory
from statistics import median
from typing import Any

import torch

import shmx
from shmx import ArenaFullError, _core
from shmx.arena import default_arena

from ..contenders import clock
from ..options import Options
from ..payloads import parse
from ..process_tree import MeasurementError
from ..report import Check, Report, Table, quantile, size_text
from ..turns import rotated
from ..worker import Worker

__all__ = ["measure"]

SIZES = (1 << 20, 16 << 20, 128 << 20)
QUICK_SIZES = (1 << 20,)
REQUEST, QUICK_REQUEST = 8 << 20, 1 << 20
REQUESTS, QUICK_REQUESTS = 150, 20
PACE = 0.02
SLOWEST = 2.0
PRESSED, QUICK_PRESSED = 512 << 20, 32 << 20

SHMX, PREPARED, SEGMENT = "shmx", "shmx, prepared", "a segment per tensor"
WAYS = (SHMX, PREPARED, SEGMENT)
ARENA, FIRST, AGAIN = "make the arena", "first share: fresh pages, copy", "the same again: copy"
RESERVING, RESERVED = "make the arena, `reserve=`", "first share, `reserve=` taken: copy"
WARM, GROWING, AHEAD, FRESH = "arena warm", "arena must grow", "arena has taken its `reserve=`", "fresh segment"
RESERVE_BOUND = 20.0


def _timed(costs: dict[str, float], step: str, operation: Callable[[], Any]) -> Any:
    start = time.perf_counter_ns()
    result = operation()
    costs[step] = (time.perf_counter_ns() - start) / 1e3
    return result


def _warm_torch() -> None:
    """What torch does once by itself is not the first message's."""
    tensor = torch.arange(1 << 16)
    int(tensor.sum())
    tensor.clone()


def _take_reserve(arena: shmx.Arena, reserve: int) -> bool:
    """Wait until the background has taken it; False where it does not, because /dev/shm has too little room."""
    deadline = time.monotonic() + RESERVE_BOUND
    while arena.stats()["reserved_bytes"] < reserve:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# ---- first messages


class _FirstProducer:
    def __init__(self, size: int) -> None:
        _warm_torch()
        self._source = torch.randint(0, 1 << 40, (size // 8,))
        self._expected = int(self._source.sum())
        self._segment: SharedMemory | None = None

    def prepare(self) -> bytes:
        """What a service can do at its start: publish one such tensor, for consumers to attach by."""
        handle = shmx.share(self._source)
        with shmx.readers(1):
            return pickle.dumps(handle)

    def publish(self, way: str) -> tuple[bytes, int, dict[str, float]]:
        costs: dict[str, float] = {}
        if way == SEGMENT:
            self._segment = _timed(costs, "share", lambda: _segment_of(self._source))
            return pickle.dumps((self._segment.name, self._source.numel())), self._expected, costs
        handle = _timed(costs, "share", lambda: shmx.share(self._source))
        with shmx.readers(1):
            blob = _timed(costs, "dumps", lambda: pickle.dumps(handle))
        return blob, self._expected, costs

    def share_by_steps(self) -> dict[str, float]:
        """What the first share consists of."""
        costs: dict[str, float] = {}
        _timed(costs, ARENA, default_arena)
        _timed(costs, FIRST, lambda: shmx.share(self._source)).release()
        _timed(costs, AGAIN, lambda: shmx.share(self._source))
        return costs

    def share_reserved(self) -> dict[str, float]:
        """The first share of an arena that has been given the time to reserve; nothing if it could not."""
        costs: dict[str, float] = {}
        reserve = 2 * self._source.nbytes
        capacity = 2 * reserve + (64 << 20)
        arena = _timed(costs, RESERVING, lambda: shmx.Arena(capacity=capacity, reserve=reserve))
        if not _take_reserve(arena, reserve):
            return {}
        _timed(costs, RESERVED, lambda: arena.share(self._source))
        return costs

    def end(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment.unlink()


def _segment_of(source: torch.Tensor) -> SharedMemory:
    segment = SharedMemory(create=True, size=source.nbytes)
    _core.copy(torch.frombuffer(segment.buf, dtype=torch.uint8).data_ptr(), source.data_ptr(), source.nbytes, "plain")
    return segment


class _FirstConsumer:
    def __init__(self) -> None:
        _warm_torch()

    def prepare(self, blob: bytes) -> float:
        handle = pickle.loads(blob)
        elapsed = clock(lambda: shmx.attach(handle))
        handle.release()
        return elapsed

    def consume(self, way: str, blob: bytes, expected: int) -> dict[str, float]:
        costs: dict[str, float] = {}
        if way == SEGMENT:
            return self._consume_segment(blob, expected, costs)
        handle = _timed(costs, "load", lambda: pickle.loads(blob))
        view = _timed(costs, "view", handle.view)
        _read_and_own(view, handle.materialize, expected, costs)
        return costs

    def _consume_segment(self, blob: bytes, expected: int, costs: dict[str, float]) -> dict[str, float]:
        name, numel = pickle.loads(blob)
        segment = _timed(costs, "load", lambda: SharedMemory(name=name))
        view = _timed(costs, "view", lambda: torch.frombuffer(segment.buf, dtype=torch.int64, count=numel))
        _read_and_own(view, view.clone, expected, costs)
        # The mapping cannot be closed while a tensor shows it.
        del view
        segment.close()
        return costs


def _read_and_own(
    view: torch.Tensor, materialize: Callable[[], torch.Tensor], expected: int, costs: dict[str, float]
) -> None:
    found = int(_timed(costs, "full read of the view", view.sum))
    own = _timed(costs, "materialize", materialize)
    if found != expected or int(own.sum()) != expected:
        raise MeasurementError("a consumer read other bytes than were shared")


def _first_messages(sizes: Sequence[int], rounds: int) -> list[Table]:
    tables = {size: Table(f"The first message of fresh processes, {size_text(size)}", "us") for size in sizes}
    steps = Table("The first share of a process, by steps", "us")
    for turn in range(rounds):
        for size in rotated(sizes, turn):
            for way in rotated(WAYS, turn):
                with Worker(_FirstProducer, size) as producer, Worker(_FirstConsumer) as consumer:
                    if way == PREPARED:
                        tables[size].add("attach", way, consumer.call("prepare", producer.call("prepare")))
                    blob, expected, costs = producer.call("publish", way)
                    costs.update(consumer.call("consume", way, blob, expected))
                    producer.call("end")
                costs["until read"] = (
                    sum(costs.get(step, 0) for step in ("share", "dumps", "load", "view"))
                    + (costs["full read of the view"])
                )
                for step, cost in costs.items():
                    tables[size].add(step, way, cost)
            for method in rotated(("share_by_steps", "share_reserved"), turn):
                with Worker(_FirstProducer, size) as producer:
                    for step, cost in producer.call(method).items():
                        steps.add(step, size_text(size), cost)
    steps.samples = {
        row: steps.samples[row] for row in (ARENA, FIRST, AGAIN, RESERVING, RESERVED) if row in steps.samples
    }
    steps.notes = [
        "`reserve=` of twice the tensor, in a process of its own; its first share comes when the background has taken "
        "that much, which is not counted."
    ]
    for table in tables.values():
        table.notes = [
            "Import not counted. Prepared: the producer has shared one such tensor, the consumer has called "
            "`shmx.attach`; then comes the first message. `load` of a segment is opening it, `materialize` clone()."
        ]
    return [*tables.values(), steps]


# ---- growth


class _Server:
    """Publishes one request after another: two arenas keep them all, another gives each back at once."""

    def __init__(self, request: int, requests: int) -> None:
        self._source = torch.randint(0, 1 << 40, (request // 8,))
        capacity = 2 * request * requests + (64 << 20)
        self._growing = shmx.Arena(capacity=capacity)
        self._reserve = request * requests
        self._ahead = shmx.Arena(capacity=capacity, reserve=self._reserve)
        self._warm = shmx.Arena(capacity=4 * request + (64 << 20))

    def serve(self, requests: int, pace: float) -> dict[str, list[float]]:
        held: dict[str, list[shmx.SharedTensor]] = {GROWING: [], AHEAD: []}
        # A process measures them beside its first large copies.
        _core.measure_non_temporal_thresholds()
        for _ in range(3):
            self._warm.share(self._source).release()

        def warm() -> float:
            return clock(lambda: self._warm.share(self._source))

        def keeping(name: str, arena: shmx.Arena) -> Callable[[], float]:
            return lambda: clock(lambda: held[name].append(arena.share(self._source)))

        def segment() -> float:
            made: list[SharedMemory] = []
            elapsed = clock(lambda: made.append(_segment_of(self._source)))
            made[0].close()
            made[0].unlink()
            return elapsed

        ways = {WARM: warm, GROWING: keeping(GROWING, self._growing), FRESH: segment}
        if _take_reserve(self._ahead, self._reserve):
            ways[AHEAD] = keeping(AHEAD, self._ahead)
        times: dict[str, list[float]] = {name: [] for name in ways}
        due = time.monotonic()
        for turn in range(requests):
            due += pace
            time.sleep(max(0.0, due - time.monotonic()))
            for name in rotated(list(ways), turn):
                times[name].append(ways[name]())
        ends = [handle for handles in held.values() for handle in (*handles[:1], *handles[-1:])]
        if not all(torch.equal(handle.view(), self._source) for handle in ends):
            raise MeasurementError("a view shows other bytes than were shared")
        return times


def _growth(request: int, requests: int) -> tuple[Table, Table, list[Check]]:
    times = Table(f"share of {size_text(request)} every {PACE * 1e3:.0f} ms while {requests} requests stay held", "us")
    against = Table("The same, as multiples of the median of the warm arena", "x")
    with Worker(_Server, request, requests) as server:
        samples = server.call("serve", requests, PACE)
    warm = median(samples[WARM])
    checks = []
    for way, values in samples.items():
        for name, q in (("first", None), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("worst", 1.0)):
            against.add(way, name, (values[0] if q is None else quantile(values, q)) / warm)
        times.samples[way] = {"all requests": values}
        if way not in (GROWING, AHEAD):
            continue
        slow = [value for value in values if value > SLOWEST * warm]
        against.notes.append(
            f"{way}: {len(slow)} of {requests} requests took more than {SLOWEST:.0f} times as long as a warm one, and "
            f"{sum(slow) / sum(values):.0%} of the time of all."
        )
        for name, q in (("slowest", 1.0), ("p99", 0.99)):
            ratio = quantile(values, q) / warm
            checks.append(Check(f"{name} request, {way} / warm", ratio, f"<= {SLOWEST}", ratio <= SLOWEST))
    if AHEAD not in samples:
        against.notes.append("`reserve=` was left out: /dev/shm has too little room to take anything ahead of need.")
    return times, against, checks


# ---- capacity


class _Full:
    def __init__(self, capacity: int, request: int) -> None:
        self._source = torch.randint(0, 1 << 40, (request // 8,))
        self._arena = shmx.Arena(capacity=capacity)
        self._held: list[shmx.SharedTensor] = []

    def fill(self, bytes_held: int) -> None:
        while (len(self._held) + 1) * self._source.nbytes <= bytes_held:
            self._held.append(self._arena.share(self._source))

    def cycle(self, repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            made: list[shmx.SharedTensor] = []
            times.append(clock(lambda made=made: made.append(self._arena.share(self._source))))  # type: ignore[misc]
            made[0].release()
        return times

    def refused(self, repeats: int) -> list[float]:
        def refuse() -> None:
            try:
                self._held.append(self._arena.share(self._source))
            except ArenaFullError:
                return
            raise MeasurementError("a full arena has taken another tensor")

        return [clock(refuse) for _ in range(repeats)]

    def recover(self, repeats: int) -> list[float]:
        """Release the oldest, share in its place."""
        times = []
        for _ in range(repeats):
            self._held.pop(0).release()
            times.append(clock(lambda: self._held.append(self._arena.share(self._source))))
        if not all(torch.equal(handle.view(), self._source) for handle in (self._held[0], self._held[-1])):
            raise MeasurementError("a view shows other bytes than were shared")
        return times

    def reshape(self) -> float:
        """Release three of the oldest, share a tensor of twice the size where they were."""
        for handle in self._held[:3]:
            handle.release()
        del self._held[:3]
        double = torch.cat([self._source, self._source])
        return clock(lambda: self._arena.share(double))


def _pressure(capacity: int, rounds: int) -> Table:
    request = capacity // 64
    table = Table(f"share of {size_text(request)} in an arena of {size_text(capacity)}", "us")
    for turn in range(-1, rounds):
        samples: dict[tuple[str, str], float] = {}
        with Worker(_Full, capacity, request) as full:
            for held in (0.1, 0.9):
                full.call("fill", int(capacity * held))
                samples["share", f"{held:.0%} held"] = median(full.call("cycle", 20))
            full.call("fill", capacity)
            samples["share that is refused", "100% held"] = median(full.call("refused", 20))
            samples["share after a release", "100% held"] = median(full.call("recover", 20))
            samples["share of twice the size after three releases", "100% held"] = full.call("reshape")
        if turn >= 0:
            for (row, column), sample in samples.items():
                table.add(row, column, sample)
    return table


def measure(options: Options) -> Report:
    """Measure all parts; raises ``MeasurementError`` if a consumer read other bytes than were shared."""
    quick = options.quick
    sizes = tuple(parse(name).nbytes for name in options.sizes) or (QUICK_SIZES if quick else SIZES)
    tables = _first_messages(sizes, options.rounds_or(15))
    times, against, checks = _growth(QUICK_REQUEST if quick else REQUEST, QUICK_REQUESTS if quick else REQUESTS)
    pressure = _pressure(QUICK_PRESSED if quick else PRESSED, options.rounds_or(7))
    return Report("cold", [*tables, times, against, pressure], checks)
