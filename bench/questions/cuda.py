"""How fast do tensors go from shared memory to a GPU, and what does page-locking cost?

A process of its own copies the same bytes in every way, in turns, in the same rounds; each result is compared. Host
time is that of the call, device time that between two events around it. Without a GPU every way runs on the fake device
of the tests, which shows that it works and nothing else: then there are no figures.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import shmx
from shmx import _core
from shmx import device as devices

from ..options import Options
from ..payloads import parse
from ..process_tree import MeasurementError
from ..report import Check, Report, Table, paired_ratio, size_text
from ..turns import rotated

__all__ = ["measure"]

SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30)
QUICK_SIZES = (4 << 10, 4 << 20)
PROCESSES = (1, 2, 4, 8)
ROUNDS = 20
BATCH = 32
STAGING = tuple((chunk << 20, threads) for chunk in (1, 4, 16) for threads in (1, 2, 4))
QUICK_STAGING = ((1 << 20, 1), (1 << 20, 2))
_WAYS = 8  # beside the staging rings
_BOUND_S = 1800.0
_ROOT = Path(__file__).parents[2]

POOLED, PINNED, PAGEABLE = "shmx, pooled", "torch, pinned already", "pageable"
Way = Callable[[], torch.Tensor]


def measure(options: Options) -> Report:
    """Copy in all ways; on a GPU the figures, without one the news that all of them work."""
    sizes = [parse(size).nbytes for size in options.sizes] or list(QUICK_SIZES if options.quick else SIZES)
    real = torch.cuda.is_available()
    report = Report("cuda", options={**vars(options), "rounds": options.rounds_or(ROUNDS)})
    if not real and not (_ROOT / "tests" / "fakegpu").is_dir():
        report.notes.append("Nothing was run: there is no GPU, and the fake device is in the source checkout only.")
        return report
    if not real:
        sizes = [size for size in sizes if size <= max(QUICK_SIZES)] or list(QUICK_SIZES)
    rounds = options.rounds_or(ROUNDS) if real else 1
    staging = QUICK_STAGING if options.quick or not real else STAGING
    try:
        report.tables = _in_processes(1, _copy_all, sizes, rounds, staging)[0]
        fan_out = Table("host to device from one block, all processes together", "GB/s")
        processes = options.consumers or (PROCESSES if real and not options.quick else (1, 2))
        for count in processes:
            for together in zip(*_fan_out(count, max(sizes), rounds), strict=True):
                fan_out.add(size_text(max(sizes)), str(count), sum(together))
        report.tables.append(fan_out)
    except _NoDeviceError as error:
        report.notes.append(f"Nothing was run: there is no GPU, and the fake device cannot be built: {error}")
        return report
    if real:
        _judge(report, sizes)
        return report
    ways = sorted(report.tables[0].samples)
    report.tables = []
    asked = _WAYS + len(staging)
    found = Check("ways that delivered the right bytes on the fake device", len(ways), str(asked), len(ways) == asked)
    report.checks.append(found)
    report.notes.append(
        "There is no GPU here (torch.cuda.is_available() is false), so there are no figures: the fake device copies "
        f"with the processor. The right bytes arrived by each of: {', '.join(ways)}."
    )
    return report


def _judge(report: Report, sizes: Sequence[int]) -> None:
    device_time = report.tables[1]
    for size in sizes:
        if size < 4 << 20:
            continue
        column = size_text(size)
        limit = 0.97 if size >= 64 << 20 else 0.95
        ours, theirs = device_time.samples[POOLED][column], device_time.samples[PINNED][column]
        rate = paired_ratio(theirs, ours)
        report.checks.append(Check(f"rate beside torch-pinned at {column}", rate, f">= {limit}", rate >= limit))
        host = report.tables[0].median(POOLED, column)
        report.checks.append(Check(f"call of {column}, us", host, "< 30", host < 30))
    lock = report.tables[2].median("cold", "ms per GiB")
    column = size_text(max(sizes))
    saved = report.tables[0].median(PAGEABLE, column) - device_time.median(POOLED, column)
    if saved > 0:
        copies = lock * 1000 * max(sizes) / 2**30 / saved
        report.notes.append(f"Locking {column} pays after {copies:.1f} copies instead of pageable ones.")


def _fan_out(count: int, size: int, rounds: int) -> list[list[float]]:
    """GB/s of each process in each round, while all copy the same block at once, each to its own device."""
    with shmx.Arena(capacity=size + (64 << 20), segment_bytes=size + (64 << 20)) as arena:
        handle = arena.share(torch.randint(0, 255, (size,), dtype=torch.uint8))
        return _in_processes(count, _copy_beside_others, handle.to_bytes(readers=count), size, rounds)


# ---- processes ----


class _NoDeviceError(Exception):
    """The fake device cannot be built."""


def _in_processes(count: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    started = []
    for number in range(count):
        near, far = context.Pipe()
        process = context.Process(target=_enter, args=(far, number, barrier, target, arguments))
        process.start()
        far.close()
        started.append((process, near))
    answers = []
    try:
        for _, near in started:
            if not near.poll(_BOUND_S):
                raise MeasurementError(f"a copying process did not answer for {_BOUND_S:.0f} s")
            kind, answer = near.recv()
            if kind == "no device":
                raise _NoDeviceError(answer)
            if kind == "error":
                raise MeasurementError(answer)
            answers.append(answer)
    except EOFError as error:
        raise MeasurementError("a copying process has died") from error
    finally:
        for process, near in started:
            near.close()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
    return answers


def _enter(
    connection: Connection[Any, Any], number: int, barrier: Any, target: Callable[..., Any], arguments: Any
) -> None:
    try:
        connection.send(("answer", target(_device(number), barrier, *arguments)))
    except _NoDeviceError as error:
        connection.send(("no device", str(error)))
        barrier.abort()
    except BaseException:
        connection.send(("error", traceback.format_exc()))
        barrier.abort()  # nobody waits for this one


def _device(number: int) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", number % torch.cuda.device_count())
    sys.path.insert(0, str(_ROOT))
    fake = importlib.import_module("tests.fakegpu")
    try:
        fake.use(*fake.build())
    except fake.Unavailable as error:
        raise _NoDeviceError(str(error)) from error
    return torch.device("privateuseone", 0)


# ---- in a process with a device ----


def _copy_all(
    device: torch.device, barrier: Any, sizes: Sequence[int], rounds: int, staging: Sequence[tuple[int, int]]
) -> list[Table]:
    host = Table("time of the call", "us", baseline=POOLED)
    on_device = Table("time on the device, from the call to the last byte", "us", baseline=POOLED)
    locking = Table("locking pages", "ms")
    overlap = Table("a matrix product on another stream", "us")
    for size in sizes:
        source = torch.randint(0, 255, (size,), dtype=torch.uint8)
        # Room for the message, and for the same bytes in parts. The second one holds a single message: a segment of its
        # own, registered for each.
        with (
            shmx.Arena(capacity=2 * size + (64 << 20), segment_bytes=2 * size + (64 << 20)) as arena,
            shmx.Arena(capacity=size, segment_bytes=size) as own,
        ):
            handle, single = arena.share(source), own.share(source)
            _lock(handle, device, locking, arena)
            ways = _ways(device, source, handle, single, staging)
            for way in ways.values():
                _same(way(), source)
            for number in range(rounds):
                for name in rotated(list(ways), number):
                    call, done = _time(ways[name], device)
                    host.add(name, size_text(size), call)
                    on_device.add(name, size_text(size), done)
            parts = arena.share_many(torch.tensor_split(source, BATCH))
            shmx.attach(handle, pin="require", device=device)
            batch = _batches(device, parts)
            for number in range(rounds):
                for name in rotated(list(batch), number):
                    call, done = _time(batch[name], device)
                    host.add(name, size_text(size), call)
                    on_device.add(name, size_text(size), done)
            for way in batch.values():
                _same(way(), source)
            _overlap(overlap, device, handle, size, rounds)
            del parts, batch, handle, single, ways
            _settle(device)
    return [host, on_device, locking, overlap]


def _batches(device: torch.device, parts: Sequence[shmx.SharedTensor]) -> dict[str, Way]:
    return {
        f"{BATCH} tensors, one batch": lambda: torch.cat(devices.materialize_many(parts, device)),
        f"{BATCH} tensors, one by one": lambda: torch.cat([part.materialize(device) for part in parts]),
    }


def _settle(device: torch.device) -> None:
    torch.accelerator.synchronize(device)
    while _core.pin_report()["copies_in_flight"]:
        _core.poll_copies()


def _lock(handle: shmx.SharedTensor, device: torch.device, table: Table, arena: shmx.Arena) -> None:
    for row in ("cold", "warm"):
        before = _core.pin_report()["milliseconds"]
        shmx.attach(handle, pin="require", device=device)
        spent = _core.pin_report()["milliseconds"] - before
        table.add(row, "ms per GiB", spent / arena.stats()["reserved_bytes"] * 2**30)
        if row == "cold":
            _core.unpin(handle)


def _ways(
    device: torch.device,
    source: torch.Tensor,
    handle: shmx.SharedTensor,
    single: shmx.SharedTensor,
    staging: Sequence[tuple[int, int]],
) -> dict[str, Way]:
    private = source.clone()
    pinned = source.pin_memory()
    backend = devices.DRIVERS[torch.zeros(0, device=device).device.type]

    def registered_for_it() -> torch.Tensor:
        _core.pin(single, backend, device.index)
        arrived = single.materialize(device, non_blocking=False)
        _settle(device)
        _core.unpin(single)
        return arrived

    ways: dict[str, Way] = {
        PAGEABLE: lambda: private.to(device),
        "torch, pin_memory for each": lambda: private.pin_memory().to(device, non_blocking=True),
        PINNED: lambda: pinned.to(device, non_blocking=True),
        "shmx, registered for each": registered_for_it,
        POOLED: lambda: handle.materialize(device),
        "clone of the view, then to()": lambda: handle.view().clone().to(device),
    }
    for chunk, threads in staging:
        ring = devices.StagingRing(device, chunk, 2, threads)

        def staged(ring: devices.StagingRing = ring) -> torch.Tensor:
            arrived = torch.empty_like(source, device=device)
            ring.copy(arrived, handle.view(), torch.accelerator.current_stream(device))
            return arrived

        ways[f"staging ring, {size_text(chunk)}, {threads} thread{'s' if threads > 1 else ''}"] = staged
    return ways


def _time(way: Way, device: torch.device) -> tuple[float, float]:
    """Microseconds of the call, and between the events around it."""
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    stream = torch.accelerator.current_stream(device)
    torch.accelerator.synchronize(device)
    begin.record(stream)
    start = time.perf_counter()
    arrived = way()
    call = time.perf_counter() - start
    end.record(stream)
    end.synchronize()
    del arrived
    return call * 1e6, begin.elapsed_time(end) * 1e3


def _overlap(table: Table, device: torch.device, handle: shmx.SharedTensor, size: int, rounds: int) -> None:
    left = torch.ones(512, 512, device=device)
    other = torch.Stream(device)

    def multiply() -> torch.Tensor:
        return left @ left

    def multiply_beside_a_copy() -> torch.Tensor:
        with other:  # not stream=other: then the product would wait for the copy
            copy = handle.materialize(device)
        product = left @ left
        del copy
        return product

    for _ in range(rounds):
        table.add("alone", size_text(size), _time(multiply, device)[1])
        table.add("beside a copy from shared memory", size_text(size), _time(multiply_beside_a_copy, device)[1])


def _copy_beside_others(device: torch.device, barrier: Any, blob: bytes, size: int, rounds: int) -> list[float]:
    handle = shmx.SharedTensor.from_bytes(blob)
    shmx.attach(handle, pin="require", device=device)
    _same(handle.materialize(device), handle.view())
    rates = []
    for _ in range(rounds):
        barrier.wait()
        start = time.perf_counter()
        handle.materialize(device, non_blocking=False)
        rates.append(size / (time.perf_counter() - start) / 1e9)
    handle.release()
    _settle(device)
    return rates


def _same(arrived: torch.Tensor, source: torch.Tensor) -> None:
    if not torch.equal(arrived.cpu(), source):
        raise MeasurementError("wrong bytes have arrived on the device")
