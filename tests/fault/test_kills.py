"""Rules 1, 2, 6 and 7 under SIGKILL at random moments: no corrupt read, no announced load lost, nothing left."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import shmx
from tests.children import Children
from tests.fault.workers import zygote


def _kill_and_replace(children: Children, folder: Path, *, slots: int, kills: int, seed: int) -> dict[str, Any]:
    began = time.monotonic()
    child = children.start(zygote, folder, slots, kills, seed)
    while (message := child.receive())[0] == "kills":
        pass
    counts = message[1]
    child.join()
    complaints = counts.pop("complaints")
    print(f"seed {seed}, {slots} workers, {time.monotonic() - began:.0f} s: {counts}, {len(complaints)} complaints")
    assert not complaints, complaints[:5]
    assert counts["expired"] == 0
    return counts


def _nothing_is_left(segments) -> None:
    bytes_left = sum(arena["memory_bytes"] for arena in shmx.arenas() if arena["name"].removeprefix("/") in segments())
    names_left = len(segments())
    removed = sum(entry["outcome"] == "removed" for entry in shmx.gc(force=True))
    print(f"{names_left} names and {bytes_left >> 20} MiB before the reaper, {removed} arenas removed")
    assert not segments()


def test_random_kills_corrupt_nothing_lose_no_announced_load_and_leave_nothing(children, segments, tmp_path):
    counts = _kill_and_replace(children, tmp_path, slots=6, kills=200, seed=1)
    assert counts["kills"] >= 200
    assert counts["loaded"] > 1000
    _nothing_is_left(segments)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("slots", "seed"), [(6, 2), (12, 3)])
def test_ten_thousand_random_kills_corrupt_nothing_lose_no_announced_load_and_leave_nothing(
    children, segments, tmp_path, slots, seed
):
    counts = _kill_and_replace(children, tmp_path, slots=slots, kills=5_000, seed=seed)
    assert counts["loaded"] > 50_000
    _nothing_is_left(segments)
