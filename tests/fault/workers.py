"""Workers for chaos: they publish, forward, load, keep, verify, fork and exit at random until somebody kills them.

A worker owns a datagram socket in a folder and writes to those of the others. What it finds wrong goes to a log file,
because it may be dead the moment after.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import socket
from pathlib import Path
from typing import Any

import torch

import shmx

SLOTS = 6
CAPACITY = 32 << 20


def content(seed: int, elements: int) -> torch.Tensor:
    """Bytes that no other message has: a different start and step for each seed."""
    return torch.arange(elements, dtype=torch.int64) * (2 * (seed % 1009) + 1) + seed


def mailbox(folder: Path, slot: int) -> str:
    return str(folder / f"worker-{slot}")


class Worker:
    """One worker's state; ``step`` does one random thing."""

    def __init__(self, folder: Path, slot: int, seed: int) -> None:
        self.folder, self.slot = folder, slot
        self.random = random.Random(seed)
        self.log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.kept: list[tuple[int, Any, torch.Tensor]] = []
        self.inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        Path(mailbox(folder, slot)).unlink(missing_ok=True)
        self.inbox.bind(mailbox(folder, slot))
        self.inbox.setblocking(False)
        self.outbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.outbox.setblocking(False)

    def note(self, what: str) -> None:
        os.write(self.log, f"{what}\n".encode())

    def verify(self, seed: int, tensor: torch.Tensor, where: str) -> None:
        if not torch.equal(tensor, content(seed, tensor.numel())):
            self.note(f"corrupt {where}: message {seed}")

    def send(self, seed: int, handle: shmx.SharedTensor) -> None:
        with shmx.readers(1):
            blob = pickle.dumps((seed, handle))
        try:
            self.outbox.sendto(blob, mailbox(self.folder, self.random.randrange(SLOTS)))
        except OSError:  # nobody there, or a full mailbox
            shmx.discard(blob)

    def publish(self) -> None:
        seed = self.random.getrandbits(40)
        try:
            handle = shmx.share(content(seed, self.random.randint(1, 32 << 10)))
        except shmx.ArenaFullError:
            # Messages that a killed worker will never load hold on to their blocks until their time-to-live.
            self.note("full")
            return
        self.send(seed, handle)

    def receive(self) -> None:
        try:
            blob = self.inbox.recv(4096)
        except BlockingIOError:
            return
        seed, handle = pickle.loads(blob)
        try:
            view = handle.view()
        except shmx.ShmxError as error:
            self.note(f"lost message {seed}: {error}")
            return
        self.note("loaded")
        self.verify(seed, view, "view")
        choice = self.random.random()
        if choice < 0.4:
            self.kept.append((seed, handle, view))
        elif choice < 0.6:
            self.send(seed, handle)
        elif choice < 0.8:
            own = handle.materialize()
            handle.release()
            del view
            self.verify(seed, own, "materialized")

    def let_go(self) -> None:
        if self.kept:
            seed, _, view = self.kept.pop(self.random.randrange(len(self.kept)))
            self.verify(seed, view, "kept view")

    def fork(self) -> None:
        if os.fork() == 0:
            for seed, handle, view in self.kept:
                self.verify(seed, view, "inherited view")
                self.verify(seed, handle.view(), "view of an inherited handle")
            os._exit(0)

    def step(self) -> None:
        choice = self.random.random()
        if choice < 0.45:
            self.publish()
        elif choice < 0.9 and len(self.kept) < 8:
            self.receive()
        elif choice < 0.985:
            self.let_go()
        elif choice < 0.995:
            self.fork()
        elif choice < 0.996:
            raise SystemExit


def _work(folder: Path, slot: int, seed: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        worker = Worker(folder, slot, seed)
        while True:
            worker.step()
    except SystemExit:
        shmx._core.leave_all()
        os._exit(0)
    except BaseException as error:
        os.write(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), f"failed: {error!r}\n".encode())
        os._exit(1)


def zygote(connection: Any, folder: Path) -> None:
    """Fork a worker for each (slot, seed) received and answer its pid; None ends it. torch is imported only once."""
    shmx.configure(capacity=CAPACITY)
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while (request := connection.recv()) is not None:
        pid = os.fork()
        if pid == 0:
            _work(folder, *request)
        connection.send(pid)
