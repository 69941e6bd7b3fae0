"""A dead consumer costs the producer what it held, for as long as a sweep takes. Figures are printed, not judged."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections import deque
from contextlib import suppress
from typing import Any

import pytest
import torch

import shmx
from tests.children import Children
from tests.patterns import BLOCK

WINDOW = 8  # messages that a consumer keeps
# The windows of a living consumer and of a dead one, what is on its way, and what was received and never loaded.
CAPACITY = 64 * BLOCK
TTL_S = 1.0
QUEUE_BYTES = 8192


class Line:
    """A producer and its consumer of the moment. The queue outlives the consumer: its successor goes on there."""

    def __init__(self) -> None:
        self.arena = shmx.Arena(capacity=CAPACITY, segment_bytes=CAPACITY, ticket_ttl=TTL_S)
        self.tensor = torch.full((BLOCK,), 7, dtype=torch.uint8)
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.near.setblocking(False)
        self.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUE_BYTES)
        self.consumer = self.start()

    def start(self) -> int:
        if (pid := os.fork()) != 0:
            return pid
        self.near.close()
        kept: deque[torch.Tensor] = deque(maxlen=WINDOW)
        while blob := self.far.recv(4096):
            with suppress(shmx.StaleHandleError):  # it has waited for longer than its time-to-live
                kept.append(pickle.loads(blob).view())
        os._exit(0)

    def kill(self) -> int:
        """Answers how many blocks the dead one holds."""
        os.kill(self.consumer, signal.SIGKILL)
        os.waitpid(self.consumer, 0)
        return int(self.arena.stats()["held_blocks"])

    def publish(self) -> float:
        """One message; answers how long its share took, in seconds."""
        began = time.perf_counter()
        handle = self.arena.share(self.tensor)
        took = time.perf_counter() - began
        with shmx.readers(1):
            blob = pickle.dumps(handle)
        handle.release()
        try:
            self.near.send(blob)
        except BlockingIOError:
            shmx.discard(blob)
        return took


def _produce(connection: Any, kills: int, every_s: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    line = Line()
    calm: list[float] = []
    stalls: list[float] = []
    held: list[int] = []
    until = time.monotonic() + every_s * kills / 4
    while time.monotonic() < until:
        calm.append(line.publish())
    for _ in range(kills):
        until = time.monotonic() + every_s
        while time.monotonic() < until:
            stalls.append(line.publish())
        held.append(line.kill())
        line.consumer = line.start()
    held.append(line.kill())
    began = time.perf_counter()
    line.arena.sweep(expire_messages=False)
    sweep = time.perf_counter() - began
    left = line.arena.stats()["held_blocks"]
    line.arena.sweep(expire_messages=False)
    line.arena.close()
    with suppress(BlockingIOError):
        line.far.setblocking(False)
        while True:
            shmx.discard(line.far.recv(4096))
    return {
        "published": len(stalls),
        "most held": max(held),
        "held by all the dead": sum(held),
        "held after a sweep": left,
        "sweep ms": 1e3 * sweep,
        "longest stall ms": 1e3 * max(stalls),
        "0.9999 of the stalls ms": 1e3 * sorted(stalls)[int(0.9999 * len(stalls))],
        "longest without a death ms": 1e3 * max(calm),
    }


def _judge(children: Children, kills: int) -> None:
    child = children.start(_produce, kills, 0.1)
    figures = child.result()
    print(f"{kills} consumers killed, one each 100 ms: " + ", ".join(f"{what} {n:.6g}" for what, n in figures.items()))
    # One more than the window: the one that is loaded before another is let go.
    assert figures["most held"] <= WINDOW + 1
    assert figures["held after a sweep"] == 0


def test_a_dead_consumer_costs_at_most_its_own_holds(children, segments):
    """Rule 6: no request is refused, although the dead have held more than there is."""
    _judge(children, 15)
    shmx.gc(force=True)  # what was received and never loaded keeps its time-to-live
    assert not segments()


@pytest.mark.long
def test_three_hundred_dead_consumers_cost_at_most_their_own_holds(children, segments):
    _judge(children, 300)
    shmx.gc(force=True)
    assert not segments()
