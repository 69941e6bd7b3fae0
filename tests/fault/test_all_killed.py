"""All processes of an engine are killed at once: what they leave is gone at the next start, or by force at once.

In a /dev/shm of its own, so that every byte of it can be accounted for.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from tests.fault.own_shm import names, run_scenario, used_bytes, wait_for_the_dead

pytestmark = pytest.mark.skipif(os.environ.get("SHMX_BACKEND") == "memfd", reason="the kernel frees what has no name")

MIB = 1 << 20
BOUND_S = 60.0
TTL_S = 2.0


def test_at_the_next_start_nothing_is_left_once_the_time_to_live_is_over():
    """Rule 7."""
    print(run_scenario(__name__, after_the_time_to_live.__name__, 256 * MIB))


def test_by_force_nothing_is_left_at_once():
    """Rule 7."""
    print(run_scenario(__name__, by_force.__name__, 256 * MIB))


# ---- scenarios


def kill_an_engine(ttl: float) -> None:
    """Two producers, four consumers and their forked children in one process group, killed in one system call."""
    engine = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, "engine", str(ttl)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert engine.stdout is not None
    assert engine.stdout.read(6) == b"ready\n"
    os.killpg(engine.pid, signal.SIGKILL)
    engine.stdout.read()  # its end: nobody has the pipe any more
    assert engine.wait(BOUND_S) == -signal.SIGKILL
    wait_for_the_dead()
    assert used_bytes() > 20 * MIB
    assert len(names()) >= 4


def engine(ttl: float) -> None:
    import torch

    import shmx
    from tests.patterns import is_pattern, pattern

    torch.set_num_threads(1)
    ready_in, ready_out = os.pipe()
    pipes = [os.pipe() for _ in range(4)]
    for reader, _ in pipes:
        if os.fork() == 0:
            handles = pickle.loads(os.read(reader, 1 << 16))
            kept = [handle.view() for handle in handles]
            assert all(is_pattern(view, seed) for seed, view in enumerate(kept))
            os.fork()  # inherits the holds
            os.write(ready_out, b"x")
            signal.pause()
    for _ in range(2):
        if os.fork() == 0:
            shmx.configure(capacity=64 * MIB, ticket_ttl=ttl)
            handles = [shmx.share(pattern(seed, MIB)) for seed in range(12)]
            for _, writer in pipes:
                # One load more than there are consumers: a message that waits.
                with shmx.readers(2):
                    blob = pickle.dumps(handles)
                os.write(writer, blob)
            os.write(ready_out, b"x")
            signal.pause()
    # Consumers read what comes first: 4 of them with a child each, and the 2 producers.
    for _ in range(10):
        os.read(ready_in, 1)
    os.write(1, b"ready\n")
    signal.pause()


def after_the_time_to_live() -> None:
    import shmx

    kill_an_engine(TTL_S)
    dead = set(names())
    started = time.monotonic()
    shmx.Arena(capacity=MIB).close()
    if any(arena["messages"] > arena["expired_messages"] for arena in shmx.arenas()):
        assert set(names()) & dead  # messages that may be loaded yet
    while set(names()) & dead:
        assert time.monotonic() < started + TTL_S + BOUND_S
        time.sleep(0.01)
        shmx.Arena(capacity=MIB).close()
    took = time.monotonic() - started
    assert (names(), used_bytes()) == ([], 0)
    print(f"{len(dead)} names of dead processes, 0 bytes {took:.2f} s after the death, time-to-live {TTL_S} s")


def by_force() -> None:
    from shmx.cli import main

    kill_an_engine(3600.0)
    dead, held = len(names()), used_bytes()
    assert main(["gc"]) == 0
    assert names()  # messages wait
    assert main(["gc", "--force"]) == 0
    assert (names(), used_bytes()) == ([], 0)
    print(f"{dead} names with {held >> 20} MiB of dead processes, 0 bytes after shmx gc --force")


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        engine(float(sys.argv[2]))
    else:
        globals()[sys.argv[1]]()
        print("held")
