"""How close does the copy into shared memory come to what the machine allows?

One process, one thread. All contenders copy the same source, in turns, in the same rounds: memcpy and non-temporal
stores between warm pages are the lower bounds of `share`; fresh pages are what it avoids.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.shared_memory import SharedMemory
from statistics import median

import torch

import shmx
from shmx import _core

from ..contenders import Contender, clock, take_turns
from ..options import Options
from ..payloads import parse
from ..process_tree import MeasurementError
from ..report import Check, Report, Table, paired_ratio, size_text

__all__ = ["measure"]

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 128 << 20)
QUICK_SIZES = (4 << 10, 1 << 20)
# More than the caches of the machines this was written on hold.
ROTATION = 64 << 20
HUGE_PAGE = 2 << 20
# One sample of a small copy is the median of several: a single one is as short as the clock is coarse.
SAMPLE_BYTES = 1 << 20
CHECKED_FROM = 1 << 20
MARK = 0.9

MEMCPY, STREAMING = "memcpy, warm shared", "non-temporal, warm shared"


class _Bench:
    """Source and destinations of one size."""

    def __init__(self, size: int, rotation: int) -> None:
        self.size = size
        self.source = torch.randint(0, 255, (size,), dtype=torch.uint8)
        self.places = max(2, rotation // size)
        self.private = torch.zeros(self.places * size, dtype=torch.uint8)
        # An arena each: what is released in one is the first choice of the next share there, whoever asks.
        self._bounds_arena, self._hot_arena, self._arena = (
            shmx.Arena(capacity=4 * self.places * size + (64 << 20)) for _ in range(3)
        )
        self.shared = self._bounds_arena.empty(self.places * size, dtype=torch.uint8)
        self.shared.zero_()
        self.held: deque[shmx.SharedTensor] = deque()
        self.place = 0
        self.copied: dict[Callable[[], float], torch.Tensor] = {}
        self.repeats = max(1, min(64, SAMPLE_BYTES // size))

    def copy(self, into: torch.Tensor, how: str, *, rotate: bool) -> Callable[[], float]:
        def one() -> float:
            if rotate:
                self.place = (self.place + 1) % self.places
            start = self.place * self.size if rotate else 0
            destination, source = into.data_ptr() + start, self.source.data_ptr()
            elapsed = clock(lambda: _core.copy(destination, source, self.size, how))
            self.copied[one] = into[start : start + self.size]
            return elapsed

        return lambda: self._sample(one, hot=not rotate)

    def share_hot(self) -> float:
        def one() -> float:
            handles: list[shmx.SharedTensor] = []
            elapsed = clock(lambda: handles.append(self._hot_arena.share(self.source)))
            handles[0].release()
            return elapsed

        return self._sample(one, hot=True)

    def share_rotating(self) -> float:
        def one() -> float:
            elapsed = clock(lambda: self.held.append(self._arena.share(self.source)))
            if len(self.held) >= self.places:
                self.held.popleft().release()
            return elapsed

        return self._sample(one, hot=False)

    def fill(self) -> None:
        """Let `share` hold as many blocks as it cycles through."""
        while len(self.held) < self.places - 1:
            self.held.append(self._arena.share(self.source))
        for _ in range(self.places):
            self.share_rotating()

    def _sample(self, one: Callable[[], float], *, hot: bool) -> float:
        if hot:
            # The others have used the caches since this one's last turn.
            one()
        return median(one() for _ in range(self.repeats))

    def fresh_segment(self) -> float:
        segment: list[SharedMemory] = []

        def create_and_copy() -> None:
            segment.append(SharedMemory(create=True, size=self.size))
            _copy(torch.frombuffer(segment[0].buf, dtype=torch.uint8), self.source)

        elapsed = clock(create_and_copy)
        segment[0].close()
        segment[0].unlink()
        return elapsed

    def fresh_private(self, advice: int, alignment: int) -> Callable[[], float]:
        def run() -> float:
            pages: list[torch.Tensor] = []

            def map_and_copy() -> None:
                memory = mmap.mmap(-1, self.size + alignment, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                memory.madvise(advice)
                whole = torch.frombuffer(memory, dtype=torch.uint8)
                start = -whole.data_ptr() % alignment
                pages.append(whole[start : start + self.size])
                _copy(pages[0], self.source)

            return clock(map_and_copy)

        return run

    def clone(self) -> float:
        return clock(self.source.clone)

    def right(self) -> bool:
        """Whether the last copy of each contender, and the newest blocks, hold the source's bytes."""
        views = [handle.view() for handle in list(self.held)[-2:]]
        return all(torch.equal(place, self.source) for place in [*self.copied.values(), *views])

    def close(self) -> None:
        self.held.clear()
        self.copied.clear()
        del self.shared
        for arena in (self._bounds_arena, self._hot_arena, self._arena):
            arena.close()


def _copy(into: torch.Tensor, source: torch.Tensor) -> None:
    _core.copy(into.data_ptr(), source.data_ptr(), source.nbytes, "plain")


def _contenders(bench: _Bench, hot: Table, rotating: Table, fresh: Table) -> list[Contender]:
    column = size_text(bench.size)
    made = [
        Contender(hot, "share", column, bench.share_hot),
        Contender(rotating, "share", column, bench.share_rotating),
    ]
    for table in (hot, rotating):
        rotate = table is rotating
        made += [
            Contender(table, "memcpy, warm private", column, bench.copy(bench.private, "plain", rotate=rotate)),
            Contender(table, MEMCPY, column, bench.copy(bench.shared, "plain", rotate=rotate)),
            Contender(table, STREAMING, column, bench.copy(bench.shared, "streaming", rotate=rotate)),
        ]
    made += [
        Contender(fresh, "share, rotating", column, bench.share_rotating),
        Contender(fresh, "fresh segment", column, bench.fresh_segment),
        Contender(
            fresh, "fresh private pages, 4 KiB", column, bench.fresh_private(mmap.MADV_NOHUGEPAGE, mmap.PAGESIZE)
        ),
        Contender(fresh, "torch clone()", column, bench.clone),
    ]
    if bench.size >= HUGE_PAGE:
        made.append(
            Contender(fresh, "fresh private pages, huge", column, bench.fresh_private(mmap.MADV_HUGEPAGE, HUGE_PAGE))
        )
    return made


def _checks(table: Table, mode: str, sizes: Sequence[int]) -> list[Check]:
    checks = []
    for size in sizes:
        # Below, the calls cost more than the copy.
        if size < CHECKED_FROM:
            continue
        column = size_text(size)
        bound = min((MEMCPY, STREAMING), key=lambda row: table.median(row, column))
        value = paired_ratio(table.samples[bound][column], table.samples["share"][column])
        checks.append(Check(f"{bound} / share, {mode}, {column}", value, f">= {MARK}", value >= MARK))
    return checks


def measure(options: Options) -> Report:
    """Measure every size; raises ``MeasurementError`` if a copy was wrong."""
    rotation = 4 << 20 if options.quick else ROTATION
    hot = Table("Same destination again and again", "us", baseline="share")
    rotating = Table(f"Destination rotates through {size_text(rotation)} or two tensors", "us", baseline="share")
    fresh = Table("Beside fresh pages", "us", baseline="share, rotating")
    sizes = tuple(parse(name).nbytes for name in options.sizes) or (QUICK_SIZES if options.quick else SIZES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # A process measures them beside its first large copies, and guesses until then.
    _core.measure_non_temporal_thresholds()
    try:
        for size in sizes:
            bench = _Bench(size, rotation)
            try:
                bench.fill()
                take_turns(_contenders(bench, hot, rotating, fresh), options.rounds_or(40))
                if not bench.right():
                    raise MeasurementError(f"wrong bytes after copies of {size_text(size)}")
            finally:
                bench.close()
    finally:
        torch.set_num_threads(threads)
    hot.notes = [
        "Every contender copies once untimed before its samples: the others have used the caches since its last turn.",
        f"A sample of a size below {size_text(SAMPLE_BYTES)} is the median of up to 64 calls, one clock reading each.",
    ]
    thresholds = _core.non_temporal_thresholds()
    rotating.notes = ["`share` keeps as many blocks held as the bounds have places, and releases the oldest."]
    fresh.notes = ["Making the pages and copying; closing, unlinking and freeing are not counted."]
    return Report(
        "bounds",
        [hot, rotating, fresh],
        _checks(hot, "hot", sizes) + _checks(rotating, "rotating", sizes),
        [
            f"Non-temporal stores from {size_text(thresholds['hot'])} into what is in the cache, from "
            f"{size_text(thresholds['cold'])} elsewhere. The bounds are called through the "
            "same binding as `share`. Not measured: more than one thread; huge pages in shared memory where the system "
            "does not give them.",
        ],
    )
