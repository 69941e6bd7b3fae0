"""Rules 1, 2, 6 and 7 under SIGKILL at random moments: no corrupt read, no announced load lost, nothing left."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

import shmx
from tests.children import Children
from tests.fault.workers import SLOTS, zygote


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _kill_and_replace(children: Children, folder: Path, kills: int, seed: int) -> Counter[str]:
    chance = random.Random(seed)
    mother = children.start(zygote, folder)

    def start(slot: int) -> int:
        mother.send((slot, chance.getrandbits(32)))
        return int(mother.receive())

    workers = [start(slot) for slot in range(SLOTS)]
    killed = 0
    while killed < kills:
        time.sleep(chance.uniform(0.002, 0.03))  # the random moment, not a wait for anything
        slot = chance.randrange(SLOTS)
        if _alive(workers[slot]):
            os.kill(workers[slot], signal.SIGKILL)
            killed += 1
        workers[slot] = start(slot)
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    mother.send(None)
    mother.result()
    log = (folder / "log").read_text().splitlines()
    outcome = Counter(line.split()[0] for line in log)
    print(f"{killed} kills, {dict(outcome)}")
    wrong = [line for line in log if line.split()[0] not in ("loaded", "full")]
    assert not wrong, wrong[:5]
    return outcome


def _nothing_is_left(segments) -> None:
    deadline = time.monotonic() + 60  # the forked children of killed workers end by themselves
    while segments() and time.monotonic() < deadline:
        shmx.gc(force=True)
    assert not segments()


def test_random_kills_corrupt_nothing_lose_no_announced_load_and_leave_nothing(children, segments, tmp_path):
    assert _kill_and_replace(children, tmp_path, kills=60, seed=1)["loaded"] > 0
    _nothing_is_left(segments)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_thousand_random_kills_corrupt_nothing_lose_no_announced_load_and_leave_nothing(children, segments, tmp_path):
    assert _kill_and_replace(children, tmp_path, kills=1000, seed=2)["loaded"] > 1000
    _nothing_is_left(segments)
