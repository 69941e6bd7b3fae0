"""A process under remote control: it shares, loads, views, checks, forwards, forks and ends when it is told to."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import pickle
import select
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

import shmx
from tests.children import BOUND, Child, Children
from tests.patterns import BLOCK, is_pattern, pattern, press

ENDS_IN_ORDER = ("return", "sys.exit", "raise")
ENDS_AT_ONCE = ("os._exit", "kill")

F_OFD_GETLK = 36
F_OFD_SETLK = 37
_FLOCK = struct.Struct("@hhqqi4x")
# Where segments lie in the one file of an arena without names: behind the control segment, each from a huge page on.
_FIRST_SEGMENT, _SEGMENT_STEP = 18 << 20, 2 << 20


class PeerRaised(Exception):
    """A command raised in the peer: the name of the exception's class, and its text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name


class _Ended(Exception):
    """The peer was told to return."""


def mapped_segments() -> list[str]:
    """File names of the data segments that this process has mapped; as if they had names, if they are below 2 MiB."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.partition("/dev/shm/")[2]
        if name.startswith("shmx-") and "." in name:
            found.append(name)
        name = line.partition("/memfd:")[2].removesuffix(" (deleted)")
        if name.startswith("shmx-") and (offset := int(line.split()[2], 16)):
            found.append(f"{name}.{offset // _SEGMENT_STEP - _FIRST_SEGMENT // _SEGMENT_STEP + 1}")
    return found


def control_file(arena: str) -> str:
    """A path at which an arena's control segment can be opened."""
    path = f"/dev/shm{arena}"
    if os.path.exists(path):
        return path
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link) == f"/memfd:{arena[1:]} (deleted)":
                return link
    raise FileNotFoundError(path)


def _open_descriptors() -> dict[int, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
    return found


class Commands:
    """What a peer does; every public method is a command. ``key`` names a handle and the view taken of it."""

    def __init__(self, connection: Connection, spares: list[tuple[Connection, Connection]]) -> None:
        self._connection = connection
        self._spares = spares
        self._handles: dict[str, shmx.SharedTensor] = {}
        self._views: dict[str, torch.Tensor] = {}
        self._arenas: dict[str, shmx.Arena] = {}

    def configure(self, **settings: Any) -> None:
        shmx.configure(**settings)

    def share(self, key: str, seed: int, nbytes: int = BLOCK) -> None:
        self._handles[key] = shmx.share(pattern(seed, nbytes))

    def pickle(self, key: str, readers: int | None = None) -> bytes:
        if readers is None:
            return pickle.dumps(self._handles[key])
        with shmx.readers(readers):
            return pickle.dumps(self._handles[key])

    def load(self, key: str, blob: bytes) -> str | None:
        """Unpickle; answers the class name of the error that the handle carries."""
        self._handles[key] = pickle.loads(blob)
        return self.error(key)

    def error(self, key: str) -> str | None:
        try:
            self._handles[key].view()
        except shmx.ShmxError as error:
            assert not self._handles[key].is_available or type(error) is shmx.SegmentLostError
            return type(error).__name__
        return None

    def decode(self, key: str, blob: bytes) -> bool:
        """Unpickle without touching the bytes."""
        self._handles[key] = pickle.loads(blob)
        return self._handles[key].is_available

    def view(self, key: str) -> None:
        self._views[key] = self._handles[key].view()

    def check(self, key: str, seed: int) -> bool:
        view = self._views.get(key)
        return is_pattern(self._handles[key].view() if view is None else view, seed)

    def materialize(self, key: str, seed: int) -> bool:
        return is_pattern(self._handles[key].materialize(), seed)

    def release(self, key: str) -> None:
        self._handles[key].release()

    def drop(self, key: str) -> None:
        """Let go of the handle and the view."""
        self._views.pop(key, None)
        self._handles.pop(key, None)

    def revoke(self, key: str) -> None:
        self._handles[key].revoke()

    def press(self) -> int:
        return press(shmx.default_arena())

    def arena(self) -> str:
        return shmx.default_arena().name

    def arena_stats(self) -> dict[str, Any] | None:
        return shmx.stats()["arena"]

    def attached(self) -> list[str]:
        return shmx.stats()["attached"]

    def memberships(self) -> list[dict[str, Any]]:
        return shmx.stats()["memberships"]

    def attach(self, key: str) -> None:
        shmx.attach(self._handles[key])

    def mapped(self) -> list[str]:
        return mapped_segments()

    def gc(self, force: bool = False) -> list[dict[str, Any]]:
        return shmx.gc(force=force)

    def close_descriptors(self) -> list[str]:
        """Close every descriptor but the standard ones and the connection, as a daemonizer does, and take their
        numbers for other files; answers which links of /proc/self/fd led into /dev/shm before."""
        mine = self._connection.fileno()
        links = _open_descriptors().values()
        os.closerange(3, mine)
        os.closerange(mine + 1, 4096)
        for _ in range(64):
            os.open("/dev/null", os.O_RDONLY)
        return [link for link in links if "shmx-" in link]

    def intact_descriptors(self) -> int:
        """How many of the files that close_descriptors opened are still open."""
        return sum(fd > 2 and target == "/dev/null" for fd, target in _open_descriptors().items())

    def fork(self, spare: int) -> int:
        """os.fork; the child goes on with everything it has inherited, and takes commands from a spare pipe."""
        pid = os.fork()
        if pid == 0:
            self._go_on_with(spare)
        return pid

    def raw_clone(self, spare: int) -> int:
        """As fork, by the system call alone: no at-fork handler of the C library or of Python runs."""
        number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
        # PyDLL keeps the GIL, which nobody would give back in the child.
        pid = ctypes.PyDLL(None).syscall(number, int(signal.SIGCHLD), 0, 0, 0, 0)
        if pid == 0:
            self._go_on_with(spare)
        return pid

    def _go_on_with(self, spare: int) -> None:
        # multiprocessing waits for the end of a process by a pipe, which this child has inherited.
        for descriptor, target in _open_descriptors().items():
            if target.startswith("pipe:") and descriptor > 2:
                os.close(descriptor)
        near, self._connection = self._spares[spare]
        near.close()
        with suppress(EOFError, _Ended):
            _obey(self)
        shmx._core.leave_all()
        os._exit(0)

    def become_another_program(self) -> None:
        """exec; the program waits until it is killed."""
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)  # held by the program itself, so its input never ends
        os.dup2(reader, 0)
        os.execvp("cat", ["cat"])

    def leave_all(self) -> None:
        shmx._core.leave_all()

    def wait(self, pid: int) -> int:
        """Wait for a child; its exit status, or minus the number of the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def end(self, how: str) -> None:
        if how == "sys.exit":
            sys.exit(0)
        if how == "raise":
            raise _Uncaught("the peer was told to end so")
        if how == "os._exit":
            os._exit(0)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise _Ended


class _Uncaught(BaseException):
    """Ends the process with a traceback."""


def _obey(commands: Commands) -> None:
    while True:
        name, arguments, settings = commands._connection.recv()
        try:
            answer = ("answer", getattr(commands, name)(*arguments, **settings))
        except _Ended:
            raise
        except Exception as error:
            answer = ("raised", type(error).__name__, str(error))
        commands._connection.send(answer)


def serve(connection: Connection, spares: list[tuple[Connection, Connection]]) -> None:
    """Target of a peer process."""
    # The threads of OpenMP do not survive a fork: a forked child that uses more than one of them hangs.
    torch.set_num_threads(1)
    with suppress(EOFError, _Ended):
        _obey(Commands(connection, spares))


@dataclass
class _Line:
    """What a peer and all its descendants share."""

    spares: list[tuple[Connection, Connection]]
    forked: list[Peer]


class Peer:
    """The near end: ``peer.view("a")`` runs ``Commands.view("a")`` over there."""

    def __init__(self, connection: Connection, pid: int, line: _Line) -> None:
        self.connection = connection
        self.pid = pid
        self._line = line

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **settings: self._ask(name, arguments, settings)

    def _ask(self, name: str, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        self.connection.send((name, arguments, settings))
        assert self.connection.poll(BOUND), f"process {self.pid} did not answer {name!r}"
        answer = self.connection.recv()
        if answer[0] == "raised":
            raise PeerRaised(answer[1], answer[2])
        assert answer[0] == "answer", answer[1]
        return answer[1]

    def forked(self, how: str = "fork") -> Peer:
        """A child of the peer, under remote control too."""
        index = len(self._line.forked)
        pid = self._ask(how, (index,), {})
        near, far = self._line.spares[index]
        far.close()
        child = Peer(near, pid, self._line)
        self._line.forked.append(child)
        return child

    def end(self, how: str = "return") -> None:
        """Tell it to end in one of the ways of ENDS_*; who waits for it is the caller's business."""
        self.connection.send(("end", (how,), {}))

    def tell(self, name: str) -> None:
        """Run a command that does not answer."""
        self.connection.send((name, (), {}))

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


class DirectPeer(Peer):
    """A peer that is a child of this process."""

    def __init__(self, child: Child, spares: list[tuple[Connection, Connection]]) -> None:
        super().__init__(child.connection, child.pid, _Line(spares, []))
        self._child = child

    def end(self, how: str = "return") -> int:
        """End it and wait for the end; answers the exit code."""
        super().end(how)
        return self._child.join()

    def kill(self) -> None:
        self._child.kill()

    def finish(self) -> None:
        """End it and all that it has forked, whatever of them still runs."""
        for forked in self._line.forked:
            with suppress(BrokenPipeError):
                Peer.end(forked)
            assert process_ended(forked.pid)
        if not self.connection.closed:
            self.end()


@pytest.fixture(name="start_peer")
def start_peer_fixture(children: Children) -> Iterator[Callable[..., DirectPeer]]:
    """Start peers that are not attached to anything; those that still run at the end of the test return in order.

    A peer is forked unless told otherwise: start it before this process holds a block, or it inherits the hold.
    ``spares`` is how many children it may fork.
    """
    started = []

    def start(method: str = "fork", spares: int = 0) -> DirectPeer:
        pipes = [Pipe() for _ in range(spares)]
        started.append(DirectPeer(children.start(serve, pipes, method=method), pipes))
        return started[-1]

    yield start
    for peer in started:
        peer.finish()


def process_ended(pid: int) -> bool:
    """Wait for a process that is not a child of this one; False if it goes on for BOUND seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError as error:
        assert error.errno == errno.ESRCH
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(BOUND * 1000))
    finally:
        os.close(descriptor)


def taken_slots(arena: str) -> list[int]:
    """The peer slots of an arena that a live process holds, asked of the kernel. Slot 0 is the owner's."""
    taken = []
    descriptor = os.open(control_file(arena), os.O_RDWR)
    try:
        for slot in range(shmx._core.MAX_PEERS):
            request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, slot, 1, 0)
            if _FLOCK.unpack(fcntl.fcntl(descriptor, F_OFD_GETLK, request))[0] != fcntl.F_UNLCK:
                taken.append(slot)
    finally:
        os.close(descriptor)
    return taken


def lock_slot(descriptor: int, slot: int) -> None:
    """Take a slot's lock through an open control segment; it lasts until the descriptor is closed."""
    fcntl.fcntl(descriptor, F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, slot, 1, 0))
