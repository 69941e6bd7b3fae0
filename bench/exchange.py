"""The control channel that all transports share: ZMQ over a Unix socket, one producer, several consumers.

The producer keeps a ROUTER, every consumer a DEALER. A message goes to each consumer; each answers with the time at
which it had its tensors, keeps them until it is told to check them, and gives them back. Checking begins when all have
answered, so that no consumer's check takes time from another one that still receives.
"""

from __future__ import annotations

import itertools
import pickle
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch
import zmq

from .payloads import Payload, Reference
from .process_tree import MeasurementError, Place
from .transports import interface, registry

__all__ = ["Exchange", "TransportError", "serve"]

_BOUND_MS = 120_000
_MESSAGE, _SETUP, _CHECK, _CLOSE, _PING, _STOP = range(6)
_HEADER = struct.Struct("<BBII")
_STAMP = struct.Struct("<q")
_MODES = ("view", "own", "stream")


class TransportError(Exception):
    """A transport failed, at this end or at a consumer; the others go on."""


def _address(folder: Path) -> str:
    return f"ipc://{folder}/control"


class Exchange:
    """The producer's end, with the producers of all transports that were set up."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.RCVTIMEO, _BOUND_MS)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.bind(_address(place.folder))
        self._names = [f"{index}".encode() for index in range(place.consumers)]
        self._numbers: dict[str, int] = {}
        self._unused = itertools.count()
        self.producers: dict[str, interface.Producer] = {}

    def __enter__(self) -> Exchange:
        """Wait until every consumer is connected."""
        self._collect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all transports, then let the consumers end."""
        for name in list(self.producers):
            self.close(name)
        self._command(_STOP)
        self._socket.close(linger=1000)
        self._context.term()

    def set_up(self, name: str, payload: Payload, in_flight: int = 1) -> None:
        """Make both sides of a transport for one payload.

        Raises
        ------
        TransportError
            One side could not be made; nothing is left of the other.
        """
        plan = _plan(self._place, name, payload, in_flight)
        try:
            producer = self.producers[name] = registry.load(name).Producer(plan)
            handle = producer.handle()
        except Exception as error:
            raise TransportError(f"{name}: {_one_line(error)}") from error
        number = self._numbers[name] = next(self._unused)
        try:
            self._command(_SETUP, number, pickle.dumps((name, payload, in_flight, handle)))
            self._refuse_errors(name, self._collect())
        except TransportError:
            self.close(name)
            raise

    def close(self, name: str) -> None:
        """Close the consumers of a transport, then its producer."""
        producer = self.producers.pop(name)
        if name in self._numbers:
            self._command(_CLOSE, self._numbers.pop(name))
            self._collect()
        producer.close()

    def turn(
        self, name: str, mode: str, serial: int, tensors: Sequence[torch.Tensor], *, everything: bool
    ) -> tuple[float, float]:
        """Send one message and have it checked.

        Returns
        -------
        tuple of float
            Microseconds of `put` alone, and until the last consumer had its tensors.

        Raises
        ------
        TransportError
            A side raised, or a consumer received wrong bytes.
        """
        start = time.monotonic_ns()
        try:
            frames = self.producers[name].put(tensors)
        except Exception as error:
            raise TransportError(f"{name}: {_one_line(error)}") from error
        put = time.monotonic_ns()
        self._send(name, mode, serial, frames)
        answers = self._collect()
        self._refuse_errors(name, answers)
        had = max(_STAMP.unpack(answer)[0] for answer in answers)
        self._command(_CHECK, self._numbers[name], pickle.dumps((serial, everything)))
        self._refuse_errors(name, self._collect())
        self.producers[name].recycle()
        return (put - start) / 1e3, (had - start) / 1e3

    def ping(self) -> float:
        """Microseconds until the last consumer has received a message without content."""
        start = time.monotonic_ns()
        self._command(_PING)
        had: int = max(_STAMP.unpack(answer)[0] for answer in self._collect())
        return (had - start) / 1e3

    def stream(
        self, name: str, prepared: Sequence[tuple[int, Sequence[torch.Tensor]]], messages: int, in_flight: int
    ) -> float:
        """Send many messages, at most `in_flight` of them unanswered; consumers look at the ends of each.

        Parameters
        ----------
        prepared
            Serials and tensors to send, over and over.

        Returns
        -------
        float
            Seconds from before the first `put` until the last consumer had the last message.

        Raises
        ------
        TransportError
            As for `turn`.
        """
        producer = self.producers[name]
        answered: Counter[bytes] = Counter()
        sent = recycled = had = 0
        failure: TransportError | None = None
        start = time.monotonic_ns()
        # After a failure nothing more is sent, but every answer is awaited: the next command must not meet them.
        while (sent < messages and failure is None) or answered.total() < sent * len(self._names):
            if failure is None and sent < messages and sent - recycled < in_flight:
                serial, tensors = prepared[sent % len(prepared)]
                try:
                    frames = producer.put(tensors)
                except Exception as error:
                    failure = TransportError(f"{name}: {_one_line(error)}")
                    continue
                self._send(name, "stream", serial, frames)
                sent += 1
                continue
            consumer, answer = self._receive()
            answered[consumer] += 1
            try:
                self._refuse_errors(name, [answer])
            except TransportError as error:
                failure = failure or error
                continue
            had = max(had, _STAMP.unpack(answer)[0])
            while failure is None and recycled < min(answered[each] for each in self._names):
                producer.recycle()
                recycled += 1
        if failure is not None:
            raise failure
        return (had - start) / 1e9

    def _send(self, name: str, mode: str, serial: int, frames: Sequence[interface.Frames]) -> None:
        header = _HEADER.pack(_MESSAGE, _MODES.index(mode), self._numbers[name], serial)
        for consumer, own in zip(self._names, frames, strict=True):
            self._socket.send_multipart([consumer, header, *own], copy=False)

    def _command(self, command: int, number: int = 0, body: bytes = b"") -> None:
        for consumer in self._names:
            self._socket.send_multipart([consumer, _HEADER.pack(command, 0, number, 0), body])

    def _collect(self) -> list[bytes]:
        """One answer of each consumer, in the order of the consumers."""
        answers: dict[bytes, bytes] = {}
        while len(answers) < len(self._names):
            consumer, answer = self._receive()
            if consumer in answers:
                raise MeasurementError(f"consumer {consumer.decode()} answered twice")
            answers[consumer] = answer
        return [answers[name] for name in self._names]

    def _receive(self) -> list[bytes]:
        try:
            return self._socket.recv_multipart()
        except zmq.Again:
            raise MeasurementError(f"a consumer has not answered for {_BOUND_MS // 1000} s") from None

    def _refuse_errors(self, name: str, answers: Sequence[bytes]) -> None:
        for answer in answers:
            if len(answer) > _STAMP.size:
                raise TransportError(f"{name}: {answer[_STAMP.size :].decode()}")


def _plan(place: Place, name: str, payload: Payload, in_flight: int) -> interface.Plan:
    unique = f"{place.folder.name}-{name}-{payload.name}"
    return interface.Plan(unique, place.consumers, payload.sizes, in_flight, place.lock)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def serve(place: Place) -> None:
    """A consumer: do what the producer says until it says stop."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set(zmq.IDENTITY, f"{place.index}".encode())
        socket.set(zmq.LINGER, 1000)
        socket.set(zmq.RCVTIMEO, _BOUND_MS)
        socket.set(zmq.RCVHWM, 0)
        socket.connect(_address(place.folder))
        socket.send(_STAMP.pack(0))
        _Server(place, socket).run()


class _Server:
    def __init__(self, place: Place, socket: zmq.Socket[bytes]) -> None:
        self._place = place
        self._socket = socket
        self._consumers: dict[int, interface.Consumer] = {}
        self._held: dict[int, list[list[torch.Tensor]]] = {}
        self._references: dict[int, Reference] = {}
        self._reference: tuple[str, Reference] | None = None

    def run(self) -> None:
        commands = {_SETUP: self._set_up, _CHECK: self._check, _CLOSE: self._close}
        while True:
            command, mode, number, serial = _HEADER.unpack(self._socket.recv())
            if command == _MESSAGE:
                self._receive(number, _MODES[mode], serial)
            elif command == _PING:
                self._socket.recv()
                self._socket.send(_STAMP.pack(time.monotonic_ns()))
            elif command == _STOP:
                return
            else:
                self._answer(commands[command], number, self._socket.recv())

    def _receive(self, number: int, mode: str, serial: int) -> None:
        consumer = self._consumers[number]
        frames = self._socket.recv_multipart(0, not consumer.bulk)
        try:
            tensors = consumer.own(frames) if mode == "own" else consumer.open(frames)
            if mode == "stream":
                self._references[number].check_ends(tensors, serial)
                del tensors
                consumer.done()
        except Exception as error:
            self._socket.send(_STAMP.pack(0) + _one_line(error).encode())
            return
        self._socket.send(_STAMP.pack(time.monotonic_ns()))
        if mode != "stream":
            self._held[number].append(tensors)

    def _answer(self, action: Callable[[int, bytes], None], number: int, body: bytes) -> None:
        error = ""
        try:
            action(number, body)
        # Any failure of a transport is reported, and ends that transport alone.
        except Exception as failed:
            error = _one_line(failed)
        self._socket.send(_STAMP.pack(0) + error.encode())

    def _set_up(self, number: int, body: bytes) -> None:
        name, payload, in_flight, handle = pickle.loads(body)
        plan = _plan(self._place, name, payload, in_flight)
        self._consumers[number] = registry.load(name).Consumer(plan, handle, self._place.index)
        self._held[number] = []
        # One copy of the content serves all transports of a payload.
        if self._reference is None or self._reference[0] != payload.name:
            self._reference = payload.name, Reference(payload)
        self._references[number] = self._reference[1]

    def _check(self, number: int, body: bytes) -> None:
        serial, everything = pickle.loads(body)
        tensors = self._held[number].pop(0)
        fault = self._references[number].fault(tensors, serial, everything=everything)
        del tensors
        self._consumers[number].done()
        if fault:
            raise AssertionError(fault)

    def _close(self, number: int, body: bytes) -> None:
        consumer = self._consumers.pop(number, None)
        if consumer is not None:
            self._held.pop(number).clear()
            self._references.pop(number)
            consumer.close()
