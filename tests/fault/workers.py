"""A zygote that forks workers, kills them at random moments and replaces them, and what its workers do.

A worker publishes, forwards, loads, keeps, verifies, forks and ends at random. The mailboxes are the zygote's and
outlive every worker: whoever takes a killed worker's place finds the messages that it has not received, some of them of
producers that are dead by then. The zygote alone reaps, descendants included, so no process id that it kills by can
belong to anybody else by then.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import shmx

CAPACITIES = (16 << 20, 64 << 20)  # the larger one has a thread that grows it ahead of need
# What a worker has received is lost with it. Its block, and with it a dead producer's arena, waits for so long.
TTL_S = 60.0
BOUND_S = 60.0
STEPS_PER_KILL, LONGEST_PAUSE_S = 40, 0.5
MEMFD = os.environ.get("SHMX_BACKEND") == "memfd"

COUNTS = ("steps", "published", "loaded", "forwarded", "forked", "exited", "full", "stale", "expired", "ownerless")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, argument: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def content(seed: int, elements: int) -> torch.Tensor:
    """Bytes that no other message has: a different start and step for each seed."""
    return torch.arange(elements, dtype=torch.int64) * (2 * (seed % 1009) + 1) + seed


def _born() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _life(pid: int) -> str | None:
    """The moment a process began, nothing if it has ended: with the process id it names one process only."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Tally:
    """Counters in memory that all share; a row of them is written by one process at a time, so none is lost."""

    def __init__(self, rows: int) -> None:
        self._words = memoryview(mmap.mmap(-1, 8 * rows * (len(COUNTS) + 1))).cast("Q")
        self._width = len(COUNTS) + 1

    def add(self, row: int, what: str) -> None:
        self._words[row * self._width + COUNTS.index(what)] += 1

    def get(self, row: int, what: str) -> int:
        return self._words[row * self._width + COUNTS.index(what)]

    def total(self, what: str) -> int:
        return sum(self._words[COUNTS.index(what) :: self._width].tolist())

    def set_child(self, row: int, pid: int) -> None:
        self._words[row * self._width + len(COUNTS)] = pid

    def child(self, row: int) -> int:
        return self._words[row * self._width + len(COUNTS)]


class Worker:
    """One worker's state; ``step`` does one random thing."""

    def __init__(self, scene: Scene, slot: int, seed: int) -> None:
        self.scene, self.slot, self.row = scene, slot, slot
        self.random = random.Random(seed)
        self.kept: list[tuple[int, Any, torch.Tensor]] = []
        self.steps_left: int | None = None  # no end
        self.identity = (os.getpid(), _life(os.getpid()))
        shmx.configure(capacity=self.random.choice(CAPACITIES), ticket_ttl=TTL_S)

    def count(self, what: str) -> None:
        self.scene.tally.add(self.row, what)

    def verify(self, seed: int, tensor: torch.Tensor, where: str) -> None:
        if not torch.equal(tensor, content(seed, tensor.numel())):
            self.scene.note(f"corrupt {where}: message {seed}")

    def elements(self) -> int:
        return self.random.randint(1, 1 << self.random.randint(1, 15))

    def send(self, seed: int, handles: list[shmx.SharedTensor], readers: int, producer: tuple[int, str]) -> None:
        """One pickle to as many mailboxes as are announced; 0 announces nothing, and one gets it."""
        with shmx.readers(readers):
            blob = pickle.dumps((seed, readers, _born(), producer, handles))
        for slot in self.random.sample(range(self.scene.slots), max(readers, 1)):
            try:
                self.scene.outboxes[slot].send(blob)
            except BlockingIOError:  # a full mailbox
                if readers == 1:
                    shmx.discard(blob)
                elif readers > 1:
                    self.open(blob)  # the load that was announced for it

    def publish(self) -> None:
        seed = self.random.getrandbits(40)
        choice = self.random.random()
        try:
            if choice < 0.2:
                own = shmx.empty((self.elements(),), dtype=torch.int64)
                own.copy_(content(seed, own.numel()))
                handles = [shmx.share(own)]
            elif choice < 0.4:
                count = self.random.randint(2, 4)
                handles = shmx.share_many(content(seed + part, self.elements()) for part in range(count))
            else:
                handles = [shmx.share(content(seed, self.elements()))]
        except shmx.ArenaFullError:
            # What killed workers have received and not released is room again only after the time-to-live.
            self.count("full")
            return
        self.count("published")
        self.send(seed, handles, self.random.choice((0, 1, 1, 1, 1, 2, 2)), self.identity)

    def receive(self) -> None:
        with suppress(BlockingIOError):
            self.open(self.scene.inboxes[self.slot].recv(8192))

    def open(self, blob: bytes) -> None:
        seed, readers, born, producer, handles = pickle.loads(blob)
        views = []
        for handle in handles:
            try:
                views.append(handle.view())
            except shmx.ShmxError as error:
                self.judge(seed, readers, born, producer, error)
                return
            self.count("loaded")
        for part, view in enumerate(views):
            self.verify(seed + part, view, "view")
        choice = self.random.random()
        if choice < 0.4:
            self.kept += [(seed + part, handles[part], view) for part, view in enumerate(views)]
        elif choice < 0.6:
            self.count("forwarded")
            self.send(seed, handles, self.random.choice((1, 2)), producer)
        elif choice < 0.8:
            owned = [handle.materialize() for handle in handles]
            for handle in handles:
                handle.release()
            del view, views
            for part, tensor in enumerate(owned):
                self.verify(seed + part, tensor, "materialized")

    def judge(self, seed: int, readers: int, born: float, producer: tuple[int, str], error: shmx.ShmxError) -> None:
        """A load that failed: was it one that may?"""
        if readers == 0 and isinstance(error, (shmx.StaleHandleError, shmx.SegmentLostError)):
            self.count("stale")
        elif _born() - born > TTL_S - 1:
            self.count("expired")
        elif MEMFD and isinstance(error, shmx.SegmentLostError) and self._ended(*producer):
            self.count("ownerless")
        else:
            self.scene.note(f"lost message {seed} for {readers} of {producer}: {error!r}")

    def _ended(self, pid: int, life: str) -> bool:
        # It gives its arena up a moment before it ends.
        deadline = time.monotonic() + 5
        while _life(pid) == life:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def let_go(self) -> None:
        if self.kept:
            seed, _, view = self.kept.pop(self.random.randrange(len(self.kept)))
            self.verify(seed, view, "kept view")

    def fork(self) -> None:
        self.count("forked")
        if os.fork() != 0:
            return
        # It goes on as another worker of this slot, for a while if nobody kills it.
        self.row = self.scene.slots + self.slot
        self.scene.tally.set_child(self.slot, os.getpid())
        self.steps_left = self.random.randint(1, 200)
        self.random.seed(self.random.getrandbits(32))
        self.identity = (os.getpid(), _life(os.getpid()))
        for seed, handle, view in self.kept:
            self.verify(seed, view, "inherited view")
            self.verify(seed, handle.view(), "view of an inherited handle")

    def step(self) -> None:
        self.count("steps")
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left == 0:
                raise SystemExit
        choice = self.random.random()
        if choice < 0.4:
            self.publish()
        elif choice < 0.9 and len(self.kept) < 8:
            self.receive()
        elif choice < 0.98:
            self.let_go()
        elif choice < 0.985 and self.steps_left is None:
            self.fork()
        elif choice < 0.993:
            shmx.trim()
        elif choice < 0.996:
            shmx.gc()
        elif choice < 0.998:
            self.count("exited")
            raise SystemExit

    def drain(self) -> None:
        """Receive whatever waits in any mailbox, and end."""
        found = True
        while found:
            found = False
            for inbox in self.scene.inboxes:
                with suppress(BlockingIOError):
                    self.open(inbox.recv(8192))
                    found = True
        self.kept.clear()


class Scene:
    """What all workers share: mailboxes, counters, and the file that says what was wrong."""

    def __init__(self, folder: Path, slots: int) -> None:
        self.slots = slots
        self.tally = Tally(2 * slots)
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(slots)]
        self.inboxes, self.outboxes = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for end in (*self.inboxes, *self.outboxes):
            end.setblocking(False)
        self._complaints = folder / "complaints"
        self._complaints.touch()

    def note(self, what: str) -> None:
        # In a file, because who writes may be dead the moment after.
        with self._complaints.open("ab", buffering=0) as file:
            file.write(f"{what}\n".encode())

    def complaints(self) -> list[str]:
        return self._complaints.read_text().splitlines()

    def start(self, slot: int, seed: int, *, drain: bool = False) -> int:
        zygote = os.getpid()
        if (pid := os.fork()) != 0:
            return pid
        try:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != zygote:
                os._exit(1)
            worker = Worker(self, slot, seed)
            if drain:
                worker.drain()
            while not drain:
                worker.step()
        except SystemExit:
            pass
        except BaseException as error:
            self.note(f"failed: {error!r}")
            os._exit(1)
        shmx._core.leave_all()
        os._exit(0)


class Killer:
    """The zygote's own part."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene = scene
        self.random = random.Random(seed)
        self.kills = 0
        self.workers: dict[int, int] = {}  # slot by process id

    def _start(self, slot: int) -> None:
        self.workers[self.scene.start(slot, self.random.getrandbits(32))] = slot

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                for slot in range(self.scene.slots):
                    if self.scene.tally.child(slot) == pid:
                        self.scene.tally.set_child(slot, 0)
                if (slot_of_worker := self.workers.pop(pid, None)) is not None:
                    self._start(slot_of_worker)

    def _pause(self) -> None:
        """Until the workers have made a random number of steps: on a busy machine they need longer to get anywhere."""
        target = self.scene.tally.total("steps") + self.random.randint(0, STEPS_PER_KILL)
        deadline = time.monotonic() + LONGEST_PAUSE_S
        while self.scene.tally.total("steps") < target and time.monotonic() < deadline:
            time.sleep(self.random.uniform(0, 0.002))
            self._reap()

    def _kill_one(self) -> None:
        victim = self.random.choice(list(self.workers))
        child = self.scene.tally.child(self.workers[victim])
        if child != 0 and self.random.random() < 0.5:
            victim = child
        if _life(victim) is None:
            return
        os.kill(victim, signal.SIGKILL)
        self.kills += 1

    def run(self, kills: int) -> Iterator[int]:
        """Kill so many; answers now and then how many it were."""
        for slot in range(self.scene.slots):
            self._start(slot)
        while self.kills < kills:
            self._pause()
            self._kill_one()
            self._reap()
            if self.kills % 100 == 0:
                yield self.kills

    def require_progress(self) -> None:
        """No worker is stuck in what a killed one has left."""
        deadline = time.monotonic() + BOUND_S
        before = {slot: self.scene.tally.get(slot, "steps") for slot in range(self.scene.slots)}
        while any(self.scene.tally.get(slot, "steps") == count for slot, count in before.items()):
            if time.monotonic() > deadline:
                self.scene.note("stuck: a worker makes no step")
                return
            self._reap()
            time.sleep(0.001)

    def end(self) -> None:
        """Kill all at once, and have what waits in the mailboxes loaded."""
        for pid in self.workers:
            os.kill(pid, signal.SIGKILL)
        self.kills += len(self.workers)
        self.workers.clear()
        with suppress(ChildProcessError):  # their children end by themselves
            while True:
                os.waitpid(-1, 0)
        os.waitpid(self.scene.start(0, self.random.getrandbits(32), drain=True), 0)


def zygote(connection: Any, folder: Path, slots: int, kills: int, seed: int) -> dict[str, Any]:
    """Kill that many workers; sends the number of kills now and then, and answers counts and complaints."""
    torch.set_num_threads(1)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    scene = Scene(folder, slots)
    killer = Killer(scene, seed)
    for number in killer.run(kills):
        connection.send(("kills", number))
    killer.require_progress()
    killer.end()
    return {
        "kills": killer.kills,
        **{what: scene.tally.total(what) for what in COUNTS},
        "complaints": scene.complaints(),
    }
