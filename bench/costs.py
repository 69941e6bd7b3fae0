"""What do share, load, view and materialize cost, beside what the machine allows?

One producer and one consumer process; every operation and every lower bound in the same run, interleaved, on the same
bytes; medians. ``python -m shmx.bench.costs``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any, TypeVar

import torch

import shmx
from shmx import _core

__all__ = ["main", "measure"]

SIZES = {"4 KiB": 4 << 10, "1 MiB": 1 << 20, "128 MiB": 128 << 20}
_BOUND = 120.0

T = TypeVar("T")
Samples = defaultdict[str, list[float]]


def _timed(samples: Samples, name: str, operation: Callable[[], T]) -> T:
    start = time.perf_counter_ns()
    result = operation()
    samples[name].append((time.perf_counter_ns() - start) / 1e3)
    return result


def _copy_bounds(samples: Samples, source: torch.Tensor, shared: torch.Tensor, private: torch.Tensor) -> None:
    size = source.nbytes
    _timed(samples, "memcpy, warm private", lambda: _core.copy(private.data_ptr(), source.data_ptr(), size, "plain"))
    _timed(samples, "memcpy, warm shared", lambda: _core.copy(shared.data_ptr(), source.data_ptr(), size, "plain"))
    _timed(
        samples,
        "non-temporal stores, warm shared",
        lambda: _core.copy(shared.data_ptr(), source.data_ptr(), size, "streaming"),
    )


def _fresh_segment(source: torch.Tensor) -> None:
    segment = SharedMemory(create=True, size=source.nbytes)
    target = torch.frombuffer(segment.buf, dtype=torch.uint8)
    target.copy_(source)
    del target
    segment.close()
    segment.unlink()


def _consume(connection: Connection) -> None:
    samples: Samples = defaultdict(list)
    while (message := connection.recv()) is not None:
        blob, expected = message
        handle = _timed(samples, "load (unpickle)", lambda blob=blob: pickle.loads(blob))  # type: ignore[misc]
        view = _timed(samples, "view", handle.view)
        own = _timed(samples, "materialize", handle.materialize)
        _timed(samples, "torch clone()", view.clone)
        _timed(samples, "release", handle.release)
        right = int(view[::4093].sum()) == expected and torch.equal(own, view)
        del view, own, handle
        connection.send(right)
    connection.send(dict(samples))


def measure(size: int, rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Medians in microseconds for one tensor size in bytes; raises ``RuntimeError`` if any content was wrong."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    consumer = context.Process(target=_consume, args=(far,), daemon=True)
    consumer.start()
    samples: Samples = defaultdict(list)
    shared, private = shmx.empty(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    try:
        for turn in range(rounds + warm_up):
            source = torch.randint(0, 255, (size,), dtype=torch.uint8)
            into = samples if turn >= warm_up else defaultdict(list)
            _copy_bounds(into, source, shared, private)
            _timed(into, "fresh segment (shared_memory)", lambda source=source: _fresh_segment(source))  # type: ignore[misc]
            handle = _timed(into, "share", lambda source=source: shmx.share(source))  # type: ignore[misc]
            with shmx.readers(1):
                blob = _timed(into, "pickle", lambda handle=handle: pickle.dumps(handle))  # type: ignore[misc]
            handle.release()
            near.send((blob, int(source[::4093].sum())))
            if not near.poll(_BOUND) or not near.recv():
                raise RuntimeError(f"wrong content at {size} bytes")
        near.send(None)
        consumed: dict[str, list[float]] = near.recv()
    finally:
        consumer.join(_BOUND)
        consumer.kill()
    samples.update({name: values[warm_up:] for name, values in consumed.items()})
    return {name: statistics.median(values) for name, values in samples.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the three sizes and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m shmx.bench.costs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="rounds per size (default 40)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    table: dict[str, dict[str, float]] = {name: measure(size, arguments.rounds) for name, size in SIZES.items()}
    if arguments.json:
        result: dict[str, Any] = {"unit": "us", "statistic": "median", "rounds": arguments.rounds, "sizes": table}
        print(json.dumps(result, indent=2))
        return 0
    print(
        f"microseconds, median of {arguments.rounds} rounds; non-temporal from {_core.non_temporal_thresholds()} bytes"
    )
    print(f"{'':36}" + "".join(f"{name:>12}" for name in table))
    for operation in next(iter(table.values())):
        print(f"{operation:36}" + "".join(f"{costs[operation]:12.1f}" for costs in table.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
