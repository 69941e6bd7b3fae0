"""Processes that do not see each other: of two PID namespaces, or of two time namespaces, over one /dev/shm."""

from __future__ import annotations

import base64
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

import shmx
from shmx import distributed
from tests.children import Children
from tests.fault.own_shm import BOUND_S, wait_for_the_dead
from tests.patterns import is_pattern, pattern

pytestmark = pytest.mark.skipif(os.environ.get("SHMX_BACKEND") == "memfd", reason="memfd needs one PID namespace")


@functools.cache
def refusal(*options: str) -> str | None:
    """Why there are no such namespaces to be had here."""
    try:
        tried = subprocess.run(
            ["unshare", *options, "--fork", "true"], capture_output=True, text=True, timeout=BOUND_S, check=False
        )
    except FileNotFoundError:
        return "unshare (util-linux) is not installed"
    return f"no such namespace here: {tried.stderr.strip()}" if tried.returncode != 0 else None


class Remote:
    """A process of this module in a PID namespace of its own, where it is process 1; a line in, a line out."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *words: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        assert answer and answer[0] == "ok", answer
        return " ".join(answer[1:])

    def end(self) -> None:
        """In order, by the end of its input."""
        self.process.communicate(timeout=BOUND_S)

    def kill(self) -> None:
        """SIGKILL; unshare has its child killed with it, a moment later."""
        self.process.kill()
        self.process.communicate(timeout=BOUND_S)


@pytest.fixture
def start() -> Iterator[Callable[[], Remote]]:
    if (reason := refusal("--pid")) is not None:
        pytest.skip(reason)
    started: list[Remote] = []

    def one() -> Remote:
        started.append(Remote())
        return started[-1]

    yield one
    for remote in started:
        if remote.process.poll() is None:
            remote.kill()


def obey() -> None:
    """The far end."""
    shmx.configure(capacity=1 << 24)
    kept: list[shmx.SharedTensor] = []
    for line in sys.stdin:
        command, *arguments = line.split()
        answer = ""
        if command == "pid":
            answer = str(os.getpid())
        elif command == "host":
            shmx.configure(backend=arguments[0])
            answer = base64.b64encode(pickle.dumps(distributed._host())).decode()
        elif command == "share":
            seed, readers = (int(argument) for argument in arguments)
            with shmx.share(pattern(seed)) as handle, shmx.readers(readers):
                answer = base64.b64encode(pickle.dumps(handle)).decode()
        elif command == "load":
            kept.append(pickle.loads(base64.b64decode(arguments[0])))
        elif command == "check":
            answer = str(is_pattern(kept[-1].view(), int(arguments[0])))
        elif command == "drop":
            kept.clear()
        elif command == "gc":
            shmx.gc()
            answer = str(shmx.default_arena().stats()["held_blocks"])
        print("ok", answer, flush=True)


def outcome_of_gc(name: str) -> str:
    (outcome,) = [entry["outcome"] for entry in shmx.gc(force=True) if entry["name"] == name]
    return str(outcome)


def test_processes_of_two_pid_namespaces_know_of_each_other_s_life_and_death(start, segments):
    """Rules 1, 6 and 7, where every process is process 1: who is alive is told by locks alone."""
    producer, first, second = start(), start(), start()
    assert {remote.ask("pid") for remote in (producer, first, second)} == {"1"}
    blob = producer.ask("share", "1", "2")
    first.ask("load", blob)
    assert first.ask("check", "1") == "True"
    (arena,) = [one for one in shmx.arenas() if "/" + min(segments()) == one["name"]]
    assert [(peer["pid"], peer["alive"]) for peer in arena["peers"]] == [(1, True), (1, True)]
    assert outcome_of_gc(arena["name"]) == "owner alive"

    # A consumer's making an arena of its own collects nobody else's.
    first.ask("share", "7", "0")
    assert first.ask("check", "1") == "True"
    assert producer.ask("gc") == "1"
    (arena,) = [one for one in shmx.arenas() if one["name"] == arena["name"]]
    assert [peer["blocks"] for peer in arena["peers"]] == [0, 1]

    first.kill()
    wait_for_the_dead(living=1)
    assert producer.ask("gc") == "0"
    (arena,) = [one for one in shmx.arenas() if one["name"] == arena["name"]]
    assert [peer["slot"] for peer in arena["peers"]] == [0]

    second.ask("load", blob)
    producer.kill()
    wait_for_the_dead(living=1)
    assert outcome_of_gc(arena["name"]) == "in use"
    assert second.ask("check", "1") == "True"
    second.ask("drop")
    second.end()
    shmx.gc(force=True)
    assert not segments()


@pytest.mark.parametrize(("backend", "one_host"), [("shm", True), ("memfd", False), ("auto", False)])
def test_ranks_that_cannot_open_each_other_s_segments_are_on_two_hosts(start, backend, one_host):
    """What has no name is opened through /proc, which shows the processes of one PID namespace."""
    first, second = start(), start()
    assert (first.ask("host", backend) == second.ask("host", backend)) is one_host


# ---- clocks


def _leave_a_message(connection: object, ttl: float) -> None:
    shmx.configure(capacity=1 << 20, ticket_ttl=ttl)
    handle = shmx.share(pattern(1))
    with shmx.readers(1):
        pickle.dumps(handle)
    os.kill(os.getpid(), 9)


def gc_of_another_time(*offset: str) -> None:
    command = ["unshare", "--time", *offset, "--fork", sys.executable, "-m", "shmx", "gc"]
    subprocess.run(command, check=True, capture_output=True, timeout=BOUND_S)


def test_a_time_to_live_is_counted_by_the_boot_clock_alone(children: Children, segments):
    """A machine that slept has waited; CLOCK_MONOTONIC stands still then, and the wall clock can be set."""
    if (reason := refusal("--time", "--boottime", "1")) is not None:
        pytest.skip(reason)
    child = children.start(_leave_a_message, 3600.0)
    assert child.join() == -9
    gc_of_another_time("--monotonic", "7200")
    assert segments()
    gc_of_another_time("--boottime", "1800")
    assert segments()
    gc_of_another_time("--boottime", "7200")
    assert not segments()


# A peer whose owner was killed; its releases are all that can remove the arena.
_LAST_PEER = """
import os, pickle, subprocess, sys, time
owner = (
    "import pickle, time, torch, shmx\\n"
    "handle = shmx.share(torch.ones(4))\\n"
    "print(pickle.dumps(handle).hex(), flush=True)\\n"
    "time.sleep(600)"
)
process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True)
blob = bytes.fromhex(process.stdout.readline())
process.kill()
process.wait()
deadline = time.monotonic() + 30
while time.monotonic() < deadline and any(name.startswith("shmx-") for name in os.listdir("/dev/shm")):
    pickle.loads(blob)
sys.exit(time.monotonic() >= deadline)
"""


@pytest.mark.needs_names
@pytest.mark.parametrize("days", [0, 394])
def test_the_last_peer_removes_an_orphan_however_long_the_machine_has_been_up(days, segments):
    """Ticks are 32 bits wide: after 388 days the upper half begins, after 776 days they begin anew."""
    offset = str(days * 86400)
    if (reason := refusal("--time", "--boottime", offset)) is not None:
        pytest.skip(reason)
    command = ["unshare", "--time", "--boottime", offset, "--fork", sys.executable, "-c", _LAST_PEER]
    subprocess.run(command, check=True, timeout=BOUND_S)
    assert not segments()


if __name__ == "__main__":
    obey()
