"""Devices in several processes: each registers for itself, releases once, and may die with a copy under way."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import shmx
from shmx import _core
from tests import fakegpu
from tests.children import Children
from tests.fakegpu import FakeDriver
from tests.patterns import BLOCK, is_pattern, pattern, press, small_arena

FAKE = torch.device("privateuseone", 0)
CONSUMERS = 8


def consume(connection: Connection, driver: str, device: str, blob: bytes) -> tuple[bool, int, int]:
    gpu = fakegpu.use(Path(driver), Path(device))
    handle = shmx.SharedTensor.from_bytes(blob)
    shmx.attach(handle, pin="require", device=FAKE)
    registered = gpu.count("HostRegister")
    with gpu.held():
        arrived = handle.materialize(FAKE)
        handle.release()
        connection.send("pending")
        assert connection.recv() == "go on"
    same = is_pattern(arrived.cpu(), 7)
    while _core.pin_report()["copies_in_flight"]:
        _core.poll_copies()
    connection.send("released")
    assert connection.recv() == "end"
    return same, registered, gpu.count("HostRegister")


def test_eight_consumers_release_once_each(gpu: FakeDriver, children: Children) -> None:
    with small_arena() as arena:
        handle = arena.share(pattern(7))
        started = []
        for _ in range(CONSUMERS):
            blob = handle.to_bytes(readers=1)
            started.append(children.start(consume, *map(str, fakegpu.build()), blob))
        assert [child.receive() for child in started] == ["pending"] * CONSUMERS
        handle.release()
        assert arena.stats()["holders"] == CONSUMERS
        assert press(arena) == 15
        for left, child in enumerate(reversed(started)):
            child.send("go on")
            assert child.receive() == "released"
            assert arena.stats()["holders"] == CONSUMERS - 1 - left
        assert press(arena) == 16
        for child in started:
            child.send("end")
        results = [child.result() for child in started]
        assert results == [(True, 1, 1)] * CONSUMERS


def die_with_a_copy_under_way(connection: Connection, driver: str, device: str, blob: bytes) -> None:
    gpu = fakegpu.use(Path(driver), Path(device))
    handle = shmx.SharedTensor.from_bytes(blob)
    shmx.attach(handle, pin="require", device=FAKE)
    gpu.hold_streams()
    handle.materialize(FAKE)
    handle.release()
    connection.send("pending")
    connection.recv()


def test_a_consumer_killed_under_its_copy_gives_its_block_back(gpu: FakeDriver, children: Children) -> None:
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        child = children.start(die_with_a_copy_under_way, *map(str, fakegpu.build()), handle.to_bytes(readers=1))
        assert child.receive() == "pending"
        handle.release()
        assert press(arena) == 15
        child.kill()
        assert press(arena) == 16


END = """
    import sys, os, torch, shmx
    from pathlib import Path
    from tests import fakegpu
    from tests.patterns import pattern
    gpu = fakegpu.use(Path(sys.argv[1]), Path(sys.argv[2]))
    FAKE = torch.device("privateuseone", 0)
    arena = shmx.default_arena()
    handle = shmx.share(pattern(1))
    shmx.attach(handle, pin="require", device=FAKE)
    gpu.library.fake_delay(50000)
    arrived = [handle.materialize(FAKE) for _ in range(3)]
    print(arena.name, gpu.count("registrations"), shmx.stats()["pinned"]["copies_in_flight"] > 0)
"""


def run_to_its_end(program: str) -> subprocess.CompletedProcess[str]:
    paths = [str(path) for path in fakegpu.build()]
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *paths],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "SHMX_CAPACITY": "8MiB"},
    )


def test_a_process_ends_in_order_with_copies_under_way(gpu: FakeDriver) -> None:
    # The driver ends it with a signal if a page is unmapped before it is unregistered, or unregistered under a copy,
    # and complains about every call that comes after its own end.
    answer = run_to_its_end(END)
    assert answer.returncode == 0, answer.stderr
    name, registrations, pending = answer.stdout.split()
    assert (registrations, pending) == ("1", "True")
    assert "fake driver" not in answer.stderr
    assert not list(Path("/dev/shm").glob(f"{name.strip('/')}*"))


def test_a_process_whose_device_never_answers_ends_all_the_same(gpu: FakeDriver) -> None:
    answer = run_to_its_end(END + "    gpu.hold_streams()\n    late = handle.materialize(FAKE)\n")
    assert answer.returncode == 0, answer.stderr
    assert "fake driver" not in answer.stderr


def test_an_owner_that_is_unmapped_by_force_would_be_seen(gpu: FakeDriver) -> None:
    # The control: the same process, with its pages unregistered under the copies.
    forced = "    [gpu.library.cuMemHostUnregister(__import__('ctypes').c_void_p(r[0])) for r in gpu.registrations()]\n"
    answer = run_to_its_end(END + forced)
    assert answer.returncode == -6
    assert "unregistered while a copy uses it" in answer.stderr


def test_a_block_of_a_dead_owner_is_copied_from_all_the_same(gpu: FakeDriver, children: Children) -> None:
    child = children.start(publish_and_die)
    blob = child.receive()
    handle = shmx.SharedTensor.from_bytes(blob)
    child.kill()
    shmx.attach(handle, pin="require", device=FAKE)
    arrived = handle.materialize(FAKE)
    handle.release()
    assert is_pattern(arrived.cpu(), 3)
    assert arrived.nbytes == BLOCK


def publish_and_die(connection: Connection) -> None:
    connection.send(shmx.share(pattern(3)).to_bytes(readers=1))
    connection.recv()
