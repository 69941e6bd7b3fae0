"""The processes of the demonstration, and what is measured in them.

The path is that of an LLM server. A producer (the tokenizer process) publishes the tensors of a request and sends the
request over ZMQ to rank 0; rank 0 broadcasts the pickled request with gloo, size first, and keeps the object that it
has; every rank turns what it received into tensors of its own, after the broadcast.

There is no barrier on this path. The parent lets one message finish before it asks for the next, and lets the ranks
compute checksums only when all of them have their tensors, so neither takes part in the timed span.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import resource
import secrets
import shutil
import signal
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import zmq

import shmx

from . import images
from .demo_transports import make_transport

__all__ = ["DemoError", "Message", "Plan", "Processes", "Ready", "checksum"]

MIB = 1 << 20
# A step of the slowest transport takes seconds; only a hang takes this long.
STEP_TIMEOUT_S = 180.0
JOIN_TIMEOUT_S = 15.0
ABORT_TIMEOUT_S = 10.0
# Sending waits only while rank 0 is not connected. It must end in time for the producer to take its message back.
SEND_TIMEOUT_S = 2.0
STOP = b""


class DemoError(Exception):
    """The run cannot start or cannot go on; the message is for the user.

    Attributes
    ----------
    usage : bool
        Whether what the user asked for is at fault, rather than the run.
    """

    def __init__(self, message: str, *, usage: bool = False) -> None:
        """Take the message and whose fault it is."""
        super().__init__(message)
        self.usage = usage


@dataclass(frozen=True)
class Plan:
    """What every process of a run has to know."""

    ranks: int
    images: Path | None
    folder: Path
    segment_prefix: str

    @staticmethod
    def make(ranks: int, image_directory: Path | None) -> Plan:
        """Make the folder for the sockets of one run, and choose the prefix of its segment names.

        Raises
        ------
        DemoError
            If the folder's name is too long for a socket in it.
        """
        folder = Path(tempfile.mkdtemp(prefix="shmx-demo-"))
        plan = Plan(ranks, image_directory, folder, f"psm_demo_{secrets.token_hex(4)}_")
        if len(plan.request_address.removeprefix("ipc://")) > zmq.IPC_PATH_MAX_LEN:
            folder.rmdir()
            raise DemoError(f"{folder} is too long a name for a folder with sockets: set TMPDIR=/tmp", usage=True)
        return plan

    @property
    def request_address(self) -> str:
        """Where the producer sends requests."""
        return f"ipc://{self.folder}/requests"

    @property
    def threads(self) -> int:
        """Threads of torch per process: more than there are cores would only compete."""
        return max(1, len(os.sched_getaffinity(0)) // (self.ranks + 1))


@dataclass(frozen=True)
class Ready:
    """A process can begin; the producer says what a request will carry, and what its arena is called."""

    images: int = 0
    payload_bytes: int = 0
    arena: str = ""


@dataclass
class Message:
    """One request sent by one transport, measured.

    Attributes
    ----------
    publish_ms : float
        From the tensors to the pickle that is ready to be sent, in the producer.
    owned_ms : float or None
        From the same start until the last rank that lost nothing owned every tensor; None if each rank lost some.
    wire_bytes : int
        Size of the ZMQ message and of the broadcast.
    producer_faults, rank_faults : int
        Minor page faults: of the producer, and of all ranks together.
    loads, lost, wrong : int
        Tensors that the ranks should own, do not own, and own with other bytes than were published.
    """

    request: int
    transport: str
    publish_ms: float
    owned_ms: float | None
    wire_bytes: int
    producer_faults: int
    rank_faults: int
    loads: int
    lost: int
    wrong: int
    errors: dict[str, int] = field(default_factory=dict)


@dataclass
class _Request:
    """What travels. `pixel_values` holds what the transport puts in the places of the tensors."""

    transport: str
    pixel_values: Any
    image_grid_thw: torch.Tensor


@dataclass(frozen=True)
class _Failed:
    message: str
    usage: bool


@dataclass(frozen=True)
class _Published:
    began: float
    ready: float
    wire_bytes: int
    checksums: list[int]


@dataclass(frozen=True)
class _Owned:
    """`errors` tells why tensors were lost: each one's reason, or None; all of them if the request was."""

    at: float
    wire_bytes: int
    faults: int
    errors: list[str | None]


class Processes:
    """The producer and the ranks of one run: spawned, awaited with a bound, killed if left.

    Parameters
    ----------
    plan : Plan
        Its folder is removed at the end.
    """

    def __init__(self, plan: Plan) -> None:
        """Start nothing yet: the processes live within the ``with`` block."""
        self.plan = plan
        self._serial = 0
        self._children: list[tuple[SpawnProcess, Connection[Any, Any]]] = []

    def __enter__(self) -> Processes:
        """Start the processes."""
        # Its start would let SIGINT through again.
        resource_tracker.ensure_running()
        try:
            # Children inherit that SIGINT waits: they leave ctrl-C to the parent, which gets it when they are started.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._start("the producer", _produce)
                for rank in range(self.plan.ranks):
                    self._start(f"rank {rank}", _serve_rank, rank)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except BaseException:
            self._end(orderly=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes, by killing them if need be."""
        self._end(orderly=kind is None)

    def ready(self) -> Ready:
        """Wait until all processes can begin.

        Returns
        -------
        Ready
            What a request will carry.

        Raises
        ------
        DemoError
            If a process failed, died or did not answer in time.
        """
        ready: Ready = self._answer(0)
        for rank in self._ranks():
            self._answer(rank)
        return ready

    def send(self, request: int, transport: str) -> Message:
        """Send one request by one transport, and measure it.

        Parameters
        ----------
        request : int
            Number of the request; it decides the order of its images.
        transport : str
            One of ``demo_transports.TRANSPORTS``.

        Raises
        ------
        DemoError
            If a process failed, died or did not answer in time.
        """
        self._serial += 1
        self._tell(0, "publish", request, transport, self._serial)
        published: _Published = self._answer(0)
        owned: list[_Owned] = [self._answer(rank) for rank in self._ranks()]
        self._tell(0, "settle")
        producer_faults: int = self._answer(0)
        for rank in self._ranks():
            self._tell(rank, "verify")
        checksums: list[list[int | None]] = [self._answer(rank) for rank in self._ranks()]
        tensors = len(published.checksums) - 1
        # A rank that has lost the request does not know how many tensors were in it.
        reasons = [report.errors if len(report.errors) == tensors else report.errors * tensors for report in owned]
        errors = Counter(reason for per_rank in reasons for reason in per_rank if reason is not None)
        complete = [report.at for report, per_rank in zip(owned, reasons, strict=True) if not any(per_rank)]
        return Message(
            request=request,
            transport=transport,
            publish_ms=(published.ready - published.began) * 1e3,
            owned_ms=(max(complete) - published.began) * 1e3 if complete else None,
            wire_bytes=published.wire_bytes + sum(report.wire_bytes for report in owned),
            producer_faults=producer_faults,
            rank_faults=sum(report.faults for report in owned),
            loads=tensors * len(owned),
            lost=errors.total(),
            wrong=sum(
                got is not None and got != expected
                for sums in checksums
                for got, expected in zip(sums, published.checksums, strict=False)
            ),
            errors=dict(errors),
        )

    def _ranks(self) -> range:
        return range(1, len(self._children))

    def _start(self, name: str, entry: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, name=name, args=(entry, theirs, self.plan, *arguments), daemon=True)
        process.start()
        theirs.close()
        self._children.append((process, ours))

    def _tell(self, who: int, *command: object) -> None:
        process, connection = self._children[who]
        try:
            connection.send(command)
        except OSError as error:
            raise _death(process, connection) from error

    def _answer(self, who: int) -> Any:
        process, connection = self._children[who]
        woken = wait([connection, *(child.sentinel for child, _ in self._children)], STEP_TIMEOUT_S)
        if not woken:
            raise DemoError(f"{process.name} has not answered for {STEP_TIMEOUT_S:.0f} s")
        if connection not in woken:
            raise next(_death(*pair) for pair in self._children if pair[0].sentinel in woken)
        try:
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise _death(process, connection) from error
        if isinstance(answer, _Failed):
            raise DemoError(answer.message, usage=answer.usage)
        return answer

    def _end(self, *, orderly: bool) -> None:
        try:
            if orderly:
                self._tell(0, "stop")
            else:
                # The ends of the pipes tell every process that nobody waits for it any more.
                self._close_pipes()
        finally:
            _join([process for process, _ in self._children], JOIN_TIMEOUT_S if orderly else ABORT_TIMEOUT_S)
            self._close_pipes()
            shutil.rmtree(self.plan.folder, ignore_errors=True)

    def _close_pipes(self) -> None:
        for _, connection in self._children:
            connection.close()


def _death(process: SpawnProcess, connection: Connection[Any, Any]) -> DemoError:
    """Say why a process is gone: by the last message it has sent, or by its exit status."""
    try:
        while connection.poll():
            last = connection.recv()
            if isinstance(last, _Failed):
                return DemoError(last.message, usage=last.usage)
    except (EOFError, OSError):
        pass
    process.join(ABORT_TIMEOUT_S)
    return DemoError(f"{process.name} ended with exit status {process.exitcode}")


def _join(processes: list[SpawnProcess], timeout_s: float) -> None:
    for end in (None, SpawnProcess.terminate, SpawnProcess.kill):
        deadline = time.monotonic() + (timeout_s if end is None else ABORT_TIMEOUT_S)
        for process in processes:
            if end is not None and process.is_alive():
                end(process)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))


def _child(entry: Callable[..., None], connection: Connection[Any, Any], plan: Plan, *arguments: object) -> None:
    """Run `entry`, and tell the parent why if it fails."""
    torch.set_num_threads(plan.threads)
    try:
        entry(connection, plan, *arguments)
    except DemoError as error:
        failed = _Failed(str(error), error.usage)
    except EOFError:
        # The parent has gone or has given up; it needs no report.
        return
    except Exception:
        failed = _Failed(f"{multiprocessing.current_process().name} failed\n{traceback.format_exc()}", False)
    else:
        return
    try:
        connection.send(failed)
    except OSError:
        return


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of dtype, shape and bytes: it tells swapped, shifted and stale bytes from the right ones."""
    kind = f"{tensor.dtype}{list(tensor.shape)}"
    return zlib.crc32(tensor.contiguous().numpy().data, zlib.crc32(kind.encode()))


# ---- producer ----


def _produce(connection: Connection[Any, Any], plan: Plan) -> None:
    try:
        pictures = images.load_directory(plan.images) if plan.images else images.load_photographs()
    except images.ImageSourceError as error:
        raise DemoError(str(error), usage=True) from error
    patched = [images.patch_image(picture) for picture in pictures]
    payload = sum(image.pixel_values.nbytes for image in patched)
    # Room for the message that is read and the one that is written.
    shmx.configure(capacity=2 * payload + 256 * MIB)
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.set(zmq.LINGER, int(ABORT_TIMEOUT_S * 1e3))
        socket.set(zmq.SNDTIMEO, int(SEND_TIMEOUT_S * 1e3))
        socket.bind(plan.request_address)
        connection.send(Ready(len(patched), payload, shmx.default_arena().name.removeprefix("/")))
        try:
            while (command := connection.recv())[0] == "publish":
                _publish(connection, plan, socket, patched, *command[1:])
            socket.send(STOP)
        except BaseException:
            # Rank 0 learns from its own pipe that the run is broken off; nothing needs to reach it.
            socket.set(zmq.LINGER, 0)
            raise


def _publish(
    connection: Connection[Any, Any],
    plan: Plan,
    socket: zmq.Socket[bytes],
    patched: list[images.PatchedImage],
    request: int,
    name: str,
    serial: int,
) -> None:
    transport = make_transport(name, segment_prefix=plan.segment_prefix)
    first = request % len(patched)
    ordered = patched[first:] + patched[:first]
    tensors = [image.pixel_values for image in ordered]
    grids = torch.cat([image.image_grid_thw for image in ordered])
    for tensor in tensors:
        # No two messages carry the same bytes, so that a rank that reads an earlier one is found out.
        tensor[-1, -1] = serial
    checksums = [checksum(tensor) for tensor in (*tensors, grids)]
    faults = _faults()
    began = time.monotonic()
    message = _Request(name, transport.publish(tensors, serial), grids)
    blob = transport.dumps(message, loads=1)
    ready = time.monotonic()
    try:
        socket.send(blob, copy=False)
        connection.send(_Published(began, ready, len(blob), checksums))
        if connection.recv() != ("settle",):
            raise EOFError
    except BaseException:
        transport.abandon(message.pixel_values)
        raise
    connection.send(_faults() - faults)


# ---- ranks ----


def _serve_rank(connection: Connection[Any, Any], plan: Plan, rank: int) -> None:
    # The name of the host may not resolve to an address of this machine, for instance in a container.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{plan.folder}/gloo",
        rank=rank,
        world_size=plan.ranks,
        timeout=datetime.timedelta(seconds=2 * STEP_TIMEOUT_S),
    )
    try:
        with zmq.Context() as context, context.socket(zmq.PULL) as socket:
            if rank == 0:
                socket.connect(plan.request_address)
            connection.send(Ready())
            while _serve(connection, plan, socket if rank == 0 else None):
                pass
    finally:
        dist.destroy_process_group()


def _serve(connection: Connection[Any, Any], plan: Plan, socket: zmq.Socket[bytes] | None) -> bool:
    """Receive one request, own its tensors and report; answers whether there was one."""
    faults = _faults()
    wire_bytes = 0
    # Rank 0 takes requests from the producer, passes them on, and keeps the object that it has.
    data = _broadcast(None) if socket is None else _take(connection, socket)
    request, errors = _load(data)
    if socket is not None and plan.ranks > 1:
        if request is not None:
            transport = make_transport(request.transport, segment_prefix=plan.segment_prefix)
            data = transport.dumps(request, loads=plan.ranks - 1)
        wire_bytes = 8 + len(_broadcast(data))
    if len(data) == len(STOP):
        return False
    sums: list[int | None] = []
    if request is not None:
        transport = make_transport(request.transport, segment_prefix=plan.segment_prefix)
        request.pixel_values, errors = transport.own(request.pixel_values)
    at = time.monotonic()
    connection.send(_Owned(at, wire_bytes, _faults() - faults, errors))
    if connection.recv() != ("verify",):
        raise EOFError
    if request is not None:
        own = zip(request.pixel_values, errors, strict=True)
        sums = [None if error else checksum(tensor) for tensor, error in own]
        sums.append(checksum(request.image_grid_thw))
    connection.send(sums)
    return True


def _take(connection: Connection[Any, Any], socket: zmq.Socket[bytes]) -> memoryview | bytes:
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(connection.fileno(), zmq.POLLIN)
    # Between two requests the parent has nothing to say but that it has gone.
    return socket.recv(copy=False).buffer if socket in dict(poller.poll()) else STOP


def _broadcast(data: memoryview | bytes | None) -> memoryview | bytes:
    """Send `data` from rank 0, size first; receive it elsewhere."""
    size = torch.tensor([0 if data is None else len(data)])
    dist.broadcast(size, src=0)
    if size.item() == len(STOP):
        return STOP
    with warnings.catch_warnings():
        # The buffer is read-only, and nobody writes to it.
        warnings.simplefilter("ignore", UserWarning)
        payload = (
            torch.empty(int(size.item()), dtype=torch.uint8)
            if data is None
            else torch.frombuffer(data, dtype=torch.uint8)
        )
    dist.broadcast(payload, src=0)
    return payload.numpy().data if data is None else data


def _load(data: memoryview | bytes) -> tuple[_Request | None, list[str | None]]:
    if len(data) == len(STOP):
        return None, []
    try:
        return pickle.loads(data), []
    # Whatever a transport raises here, the rank has lost the request: that is what the demonstration counts.
    except Exception as error:
        return None, [type(error).__name__]
