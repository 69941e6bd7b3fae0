"""What does the first message cost, and what does an arena cost that grows or is full?

First messages are measured in processes that have imported shmx and done nothing with it. Beside them: a fresh
`multiprocessing.shared_memory` segment for each tensor. Then a producer that must grow while it serves, and one that
works at its capacity.
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
ARENA, THRESHOLD, REST = "make the arena", "find out where non-temporal stores win", "share"


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
        """What the first share does besides sharing, one by one."""
        costs: dict[str, float] = {}
        _timed(costs, ARENA, default_arena)
        _timed(costs, THRESHOLD, _core.non_temporal_threshold)
        _timed(costs, REST, lambda: shmx.share(self._source))
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
            with Worker(_FirstProducer, size) as producer:
                for step, cost in producer.call("share_by_steps").items():
                    steps.add(step, size_text(size), cost)
    steps.notes = ["A first materialize of 256 KiB or more pays for the second step too, in its own process."]
    for table in tables.values():
        table.notes = [
            "Import not counted. Prepared: the producer has shared one such tensor, the consumer has called "
            "`shmx.attach`; then comes the first message. `load` of a segment is opening it, `materialize` clone()."
        ]
    return [*tables.values(), steps]


# ---- growth


class _Server:
    """Publishes one request after another: one arena keeps them all, another gives each back at once."""

    def __init__(self, request: int, requests: int) -> None:
        self._source = torch.randint(0, 1 << 40, (request // 8,))
        self._growing = shmx.Arena(capacity=2 * request * requests + (64 << 20))
        self._warm = shmx.Arena(capacity=4 * request + (64 << 20))

    def serve(self, requests: int, pace: float) -> dict[str, list[float]]:
        held: list[shmx.SharedTensor] = []
        times: dict[str, list[float]] = {"arena warm": [], "arena must grow": [], "fresh segment": []}
        # The copy's threshold is measured once per process, by the first large copy.
        for _ in range(3):
            self._warm.share(self._source).release()

        def warm() -> float:
            return clock(lambda: self._warm.share(self._source))

        def growing() -> float:
            return clock(lambda: held.append(self._growing.share(self._source)))

        def segment() -> float:
            made: list[SharedMemory] = []
            elapsed = clock(lambda: made.append(_segment_of(self._source)))
            made[0].close()
            made[0].unlink()
            return elapsed

        ways = {"arena warm": warm, "arena must grow": growing, "fresh segment": segment}
        due = time.monotonic()
        for turn in range(requests):
            due += pace
            time.sleep(max(0.0, due - time.monotonic()))
            for name in rotated(list(ways), turn):
                times[name].append(ways[name]())
        if not all(torch.equal(handle.view(), self._source) for handle in (held[0], held[-1])):
            raise MeasurementError("a view shows other bytes than were shared")
        return times


def _growth(request: int, requests: int) -> tuple[Table, Table, list[Check]]:
    times = Table(f"share of {size_text(request)} every {PACE * 1e3:.0f} ms while {requests} requests stay held", "us")
    against = Table("The same, as multiples of the median of the warm arena", "x")
    with Worker(_Server, request, requests) as server:
        samples = server.call("serve", requests, PACE)
    warm = median(samples["arena warm"])
    for way, values in samples.items():
        for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("worst", 1.0)):
            against.add(way, name, quantile(values, q) / warm)
        times.samples[way] = {"all requests": values}
    growing = samples["arena must grow"]
    slow = [value for value in growing if value > SLOWEST * warm]
    against.notes = [
        f"{len(slow)} of {requests} requests took more than {SLOWEST:.0f} times as long as a warm one, and "
        f"{sum(slow) / sum(growing):.0%} of the time of all: the request that finds no room reserves and zeroes pages "
        "for itself and the next ones."
    ]
    worst = max(growing) / warm
    p99 = quantile(growing, 0.99) / warm
    return (
        times,
        against,
        [
            Check("slowest request while the arena grows / its own copy", worst, f"<= {SLOWEST}", worst <= SLOWEST),
            Check("p99 request while the arena grows / its own copy", p99, f"<= {SLOWEST}", p99 <= SLOWEST),
        ],
    )


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
