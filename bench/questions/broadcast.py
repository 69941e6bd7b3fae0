"""How long until every rank of a model has read the tensors of a request that rank 0 received and broadcast?

The path of SGLang: a producer sends a pickled request over ZMQ to rank 0; rank 0 unpickles it, pickles it again and
broadcasts size and bytes with gloo; every rank makes tensors of its own and reads all of them once. The time runs from
before the producer's copy until the last rank has read, because a copy-on-write mapping does its work only then.
Barriers are where the transport needs them: SGLang 0.5.23 has one before and a reduction of failures after it
materializes, the class of #21465 has none and loses tensors, which are counted.
"""

from __future__ import annotations

import datetime
import math
import os
import pickle
import struct
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zmq

from .. import broadcast_transports, malloc_policy
from ..demo_transports import Transport
from ..options import Options
from ..payloads import MM32, Payload, Reference, Sources, parse
from ..process_tree import MeasurementError, Place, run
from ..reference_segment import remove_left
from ..report import Check, Report, Table, paired_ratio
from ..turns import rotated

__all__ = ["measure"]

SIZES = ("8x24MiB", MM32)
QUICK_SIZES = ("2x64KiB",)
RANKS = (4,)
ROUNDS = 30
WARM_UP = 3
EVERYTHING_EVERY = 5
_BOUND_S = 3600.0
_STEP_MS = 120_000
_HEADER = struct.Struct("<BIB")
_ANSWER = struct.Struct("<qI")
_STOP = 255


def measure(options: Options) -> Report:
    """Measure the path for all payloads."""
    transports, notes = broadcast_transports.choose(options.transports)
    payloads = [parse(size) for size in options.sizes or (QUICK_SIZES if options.quick else SIZES)]
    rounds = options.rounds_or(ROUNDS)
    warm_up = 1 if options.quick else WARM_UP
    report = Report("broadcast", options={**vars(options), "rounds": rounds, "warm_up": warm_up}, notes=notes)
    for ranks in options.consumers or ((2,) if options.quick else RANKS):
        times = Table(f"put until the last of {ranks} ranks has read its tensors once", "us", baseline="shmx")
        losses = Table(f"tensors lost per request, of those that {ranks} ranks should have", "count")
        for payload in payloads:
            for name, cells in run(
                _produce, _rank, ranks, transports, payload, rounds, warm_up, options.malloc, bound_s=_BOUND_S
            ).items():
                times.samples.setdefault(name, {})[payload.name] = cells.microseconds
                losses.samples.setdefault(name, {})[payload.name] = cells.lost
        report.tables += [times, losses]
        report.checks += _checks(times, payloads, ranks)
        report.notes += [
            f"{name} lost {sum(lost):.0f} of {len(lost) * ranks * len(payload.sizes)} tensors of {payload.name} "
            f"in {len(lost)} requests, {ranks} ranks."
            for payload in payloads
            for name, cells in losses.samples.items()
            if sum(lost := cells[payload.name])
        ]
    report.notes += [
        "Where a rank lost tensors, the time is that of the last rank that lost none; a request that every rank lost "
        "counts until the last rank gave up.",
        "shmx_view reads the arena itself; shmx reads copies that ranks own. SGLang's tensors are writable and copied "
        "page by page when they are written to, which nobody does here.",
        f"malloc policy of the ranks: '{options.malloc}' ({malloc_policy.POLICIES[options.malloc]}).",
    ]
    return report


def _checks(times: Table, payloads: Sequence[Payload], ranks: int) -> list[Check]:
    """Mark 5: faster than SGLang 0.5.23."""
    checks = []
    for payload in payloads:
        ours, theirs = (times.samples.get(row, {}).get(payload.name, []) for row in ("shmx", "sglang"))
        ratio = paired_ratio(theirs, ours) if ours and theirs else math.nan
        if not math.isnan(ratio):
            checks.append(Check(f"{payload.name}, {ranks} ranks: sglang / shmx", ratio, "> 1", ratio > 1))
    return checks


@dataclass
class _Cells:
    microseconds: list[float]
    lost: list[float]


def _prefix(place: Place) -> str:
    return f"psm_{place.folder.name}_"


def _address(place: Place) -> str:
    return f"ipc://{place.folder}/requests"


# ---- producer ----


def _produce(
    place: Place, transports: Sequence[str], payload: Payload, rounds: int, warm_up: int, malloc: str
) -> dict[str, _Cells]:
    makers = [broadcast_transports.make(name, segment_prefix=_prefix(place)) for name in transports]
    cells = {name: _Cells([], []) for name in transports}
    sources = Sources(payload)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.set(zmq.RCVTIMEO, _STEP_MS)
        socket.set(zmq.LINGER, 1000)
        socket.bind(_address(place))
        try:
            _collect(socket, place.consumers)
            for turn in range(warm_up + rounds):
                # One serial a round: all transports send the same bytes.
                tensors = sources.stamped(turn)
                for number in rotated(range(len(makers)), turn):
                    elapsed, lost = _send(socket, place, makers[number], number, turn, tensors)
                    if turn >= warm_up:
                        cells[transports[number]].microseconds.append(elapsed)
                        cells[transports[number]].lost.append(lost)
            socket.send_multipart([b"0", _HEADER.pack(_STOP, 0, 0), b""])
            _collect(socket, place.consumers)
        finally:
            remove_left(_prefix(place))
            _remove_sglang_left()
    return cells


def _send(
    socket: zmq.Socket[bytes],
    place: Place,
    transport: Transport,
    number: int,
    serial: int,
    tensors: Sequence[torch.Tensor],
) -> tuple[float, float]:
    """Microseconds, and tensors lost by all ranks."""
    start = time.monotonic_ns()
    items = transport.publish(list(tensors), serial)
    blob = transport.dumps(items, 1)
    everything = serial % EVERYTHING_EVERY == 0
    socket.send_multipart([b"0", _HEADER.pack(number, serial, everything), blob], copy=False)
    answers = [_ANSWER.unpack(answer) for answer in _collect(socket, place.consumers)]
    # Nobody checks while another one still receives.
    for rank in range(place.consumers):
        socket.send_multipart([f"{rank}".encode(), b"check"])
    faults = [answer.decode() for answer in _collect(socket, place.consumers) if answer]
    if faults:
        raise MeasurementError(f"{transport.name}: {faults[0]}")
    complete = [stamp for stamp, lost in answers if not lost]
    last = max(complete or [stamp for stamp, _ in answers])
    return (last - start) / 1e3, float(sum(lost for _, lost in answers))


def _collect(socket: zmq.Socket[bytes], ranks: int) -> list[bytes]:
    """One answer of each rank."""
    answers: dict[bytes, bytes] = {}
    while len(answers) < ranks:
        try:
            rank, answer = socket.recv_multipart()
        except zmq.Again:
            raise MeasurementError(f"a rank has not answered for {_STEP_MS // 1000} s") from None
        answers[rank] = answer
    return list(answers.values())


def _remove_sglang_left() -> None:
    """Segments that this process made through SGLang's class, and that no rank has materialized."""
    for path in Path("/dev/shm").glob(f"sgl_shm_mm_{os.getpid()}_*"):
        path.unlink(missing_ok=True)


# ---- ranks ----


def _rank(place: Place, transports: Sequence[str], payload: Payload, rounds: int, warm_up: int, malloc: str) -> None:
    malloc_policy.apply(malloc)
    # The name of the host may not resolve to an address of this machine, for instance in a container.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place.folder}/gloo",
        rank=place.index,
        world_size=place.consumers,
        timeout=datetime.timedelta(milliseconds=_STEP_MS),
    )
    try:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.set(zmq.IDENTITY, f"{place.index}".encode())
            socket.set(zmq.RCVTIMEO, _STEP_MS)
            socket.set(zmq.LINGER, 1000)
            socket.connect(_address(place))
            socket.send(b"")
            makers = [broadcast_transports.make(name, segment_prefix=_prefix(place)) for name in transports]
            _Rank(place, socket, makers, Reference(payload), len(payload.sizes)).run()
            socket.send(b"")
    finally:
        dist.destroy_process_group()


class _Rank:
    def __init__(
        self, place: Place, socket: zmq.Socket[bytes], makers: list[Transport], reference: Reference, tensors: int
    ) -> None:
        self._place = place
        self._socket = socket
        self._makers = makers
        self._reference = reference
        self._tensors = tensors

    def run(self) -> None:
        """Serve requests until one says stop."""
        while True:
            number, serial, everything, items = self._receive()
            if number == _STOP:
                return
            owned = self._own(number, items)
            del items
            kept = [tensor for tensor in owned if tensor is not None]
            for tensor in kept:
                tensor.view(torch.int64).sum()
            self._socket.send(_ANSWER.pack(time.monotonic_ns(), self._tensors - len(kept)))
            self._socket.recv()
            fault = None
            if len(kept) == self._tensors:
                fault = self._reference.fault(kept, serial, everything=bool(everything))
            # The next request must find the memory of this one free.
            del owned, kept
            self._socket.send((fault or "").encode())

    def _receive(self) -> tuple[int, int, int, list[Any] | None]:
        """Number of the transport, serial, whether to compare everything, and what unpickling gave."""
        if self._place.index:
            sizes = torch.zeros(4, dtype=torch.int64)
            dist.broadcast(sizes, src=0)
            number, serial, everything, size = sizes.tolist()
            if number == _STOP:
                return _STOP, 0, 0, None
            data = torch.empty(size, dtype=torch.uint8)
            dist.broadcast(data, src=0)
            return number, serial, everything, _load(data.numpy().data)
        number, serial, everything = _HEADER.unpack(self._socket.recv())
        blob = self._socket.recv(copy=False).buffer
        if number == _STOP:
            dist.broadcast(torch.tensor([_STOP, 0, 0, 0]), src=0)
            return _STOP, 0, 0, None
        items = _load(blob)
        if items is None:
            raise MeasurementError("rank 0 could not load the request")
        data_out = blob if self._place.consumers == 1 else self._makers[number].dumps(items, self._place.consumers - 1)
        dist.broadcast(torch.tensor([number, serial, everything, len(data_out)]), src=0)
        with warnings.catch_warnings():
            # The buffer is read-only, and nobody writes to it.
            warnings.simplefilter("ignore", UserWarning)
            dist.broadcast(torch.frombuffer(data_out, dtype=torch.uint8), src=0)
        return number, serial, everything, items

    def _own(self, number: int, items: list[Any] | None) -> list[torch.Tensor | None]:
        transport = self._makers[number]
        barrier = broadcast_transports.needs_barrier(transport.name)
        if barrier:
            dist.barrier()
        tensors, errors = transport.own(items or [])
        owned = [None if error else tensor for tensor, error in zip(tensors, errors, strict=True)]
        if barrier:
            dist.all_reduce(torch.tensor([None in owned], dtype=torch.int32), op=dist.ReduceOp.MAX)
        return owned


def _load(data: Any) -> list[Any] | None:
    try:
        items: list[Any] = pickle.loads(data)
        return items
    # As in `_own`: the rank has lost the whole request.
    except Exception:
        return None
