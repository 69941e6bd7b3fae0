"""What arenas() and gc() say of arenas in every state, and that looking changes nothing."""

from __future__ import annotations

import logging
import os
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch

import shmx
from shmx import _core
from shmx.survey import prospect
from tests.blocks import names_of
from tests.patterns import BLOCK, pattern
from tests.peer import start_peer_fixture as start_peer_fixture
from tests.peer import taken_slots

SHM = Path("/dev/shm")


def seen(name: str) -> dict:
    (found,) = (arena for arena in shmx.arenas() if arena["name"] == name)
    return found


def told(report: list[dict], name: str) -> dict:
    (found,) = (entry for entry in report if entry["name"] == name)
    return found


def snapshot(name: str) -> dict[str, tuple[bytes, int]]:
    """Content and memory of every file of an arena."""
    stem = name.removeprefix("/")
    paths = [path for path in SHM.iterdir() if path.name.partition(".")[0] == stem]
    return {path.name: (path.read_bytes(), path.stat().st_blocks) for path in paths}


def orphan(children, *, readers: int = 0, how: str = "kill") -> tuple[str, bytes]:
    child = children.start(leaves_an_arena, readers)
    name, blob = child.receive()
    if how == "kill":
        child.kill()
    else:
        child.send("end")
        child.result()
    return name, blob


def leaves_an_arena(connection, readers):
    handle = shmx.share(pattern(1))
    with shmx.readers(readers):
        blob = pickle.dumps(handle)
    connection.send((shmx.default_arena().name, blob))
    connection.recv()


@pytest.mark.needs_names
def test_an_own_arena_is_alive_with_its_holds_and_messages():
    with shmx.Arena(capacity=1 << 20) as arena:
        handle = arena.share(pattern(1))
        with shmx.readers(3):
            blob = pickle.dumps(handle)
        found = seen(arena.name)
        assert (found["state"], found["owner_pid"], found["attached"]) == ("alive", os.getpid(), True)
        assert found["capacity"] == 1 << 20
        assert found["memory_bytes"] == sum((SHM / name).stat().st_blocks * 512 for name in names_of(arena))
        assert (found["blocks_in_use"], found["bytes_in_use"]) == (1, BLOCK)
        assert (found["messages"], found["loads_to_come"], found["expired_messages"]) == (1, 3, 0)
        assert 0 <= found["oldest_message_seconds"] < 60
        owner = {"slot": 0, "pid": os.getpid(), "alive": True, "blocks": 1, "bytes": BLOCK}
        assert found["peers"] == [owner]
        shmx.discard(blob)
        handle.release()
        assert seen(arena.name)["blocks_in_use"] == 0


def test_rule_6_a_killed_peer_is_told_as_dead_with_what_it_held(start_peer):
    peer = start_peer()
    with shmx.Arena(capacity=1 << 20) as arena:
        handle = arena.share(pattern(1))
        assert peer.load("a", pickle.dumps(handle)) is None
        assert {one["pid"]: one["alive"] for one in seen(arena.name)["peers"]} == {os.getpid(): True, peer.pid: True}
        peer.kill()
        (dead,) = (one for one in seen(arena.name)["peers"] if one["pid"] == peer.pid)
        assert dead == {"slot": 1, "pid": peer.pid, "alive": False, "blocks": 1, "bytes": BLOCK}
        arena.sweep()
        assert [one["pid"] for one in seen(arena.name)["peers"]] == [os.getpid()]
        handle.release()


def test_a_stopped_peer_is_alive(start_peer):
    peer = start_peer()
    with shmx.Arena(capacity=1 << 20) as arena:
        handle = arena.share(pattern(1))
        peer.load("a", pickle.dumps(handle))
        peer.stop()
        assert all(one["alive"] for one in seen(arena.name)["peers"])
        peer.resume()
        handle.release()
        peer.release("a")


@pytest.mark.needs_names
def test_looking_changes_no_byte_makes_no_page_and_takes_no_slot(children):
    name, _ = orphan(children, readers=2)
    before = snapshot(name)
    for _ in range(3):
        assert seen(name)["state"] == "orphan"
        shmx.gc(dry_run=True, force=True)
    assert snapshot(name) == before
    assert taken_slots(name) == []
    assert told(shmx.gc(force=True), name)["outcome"] == "removed"
    assert all(arena["name"] != name for arena in shmx.arenas())


def without_age(outcome):
    """What gc told, without the seconds, which go on."""
    return {**outcome, "reason": re.sub(r"[0-9.]+ s\b", "? s", outcome["reason"])}


@pytest.mark.parametrize("how", ["kill", "end"])
@pytest.mark.needs_names
def test_rule_7_an_orphan_says_how_its_owner_ended_and_what_it_waits_for(children, how):
    name, _ = orphan(children, readers=2, how=how)
    found = seen(name)
    assert (found["state"], found["owner_left"], found["messages"]) == ("orphan", how == "end", 1)
    kept = told(shmx.gc(dry_run=True), name)
    assert kept["outcome"] == "in use"
    assert "1 message not loaded yet" in kept["reason"]
    assert ("has ended" if how == "end" else "has died") in kept["reason"]
    assert without_age(told(shmx.gc(), name)) == without_age(kept)
    would = told(shmx.gc(dry_run=True, force=True), name)
    assert would["outcome"] == "would be removed"
    assert snapshot(name)
    removed = told(shmx.gc(force=True), name)
    assert without_age(removed) == without_age({**would, "outcome": "removed"})
    assert not snapshot(name)


@pytest.mark.needs_names
def test_an_orphan_that_a_process_uses_is_kept_even_by_force(children, start_peer):
    peer = start_peer("spawn")
    name, blob = orphan(children, readers=1)
    assert peer.load("a", blob) is None
    for force in (False, True):
        for dry_run in (True, False):
            report = told(shmx.gc(force=force, dry_run=dry_run), name)
            assert report["outcome"] == "in use"
            assert f"process {peer.pid} (1 block, 64.0 KiB)" in report["reason"]
    peer.release("a")
    # The release may have come too early after the owner's death to find it out.
    assert told(shmx.gc(dry_run=True), name)["outcome"] == "would be removed"
    assert told(shmx.gc(), name)["outcome"] == "removed"


@pytest.mark.needs_names
def test_an_arena_of_a_living_owner_is_its_owners(children):
    child = children.start(leaves_an_arena, 0)
    name, _ = child.receive()
    for dry_run in (True, False):
        report = told(shmx.gc(force=True, dry_run=dry_run), name)
        assert (report["outcome"], report["reason"]) == ("owner alive", f"process {child.pid} owns it")
    child.send("end")
    child.result()


def test_ones_own_arena_is_no_matter_for_gc():
    with shmx.Arena(capacity=1 << 20) as arena:
        assert all(entry["name"] != arena.name for entry in shmx.gc(dry_run=True))
        assert prospect(seen(arena.name)) == ("in use", "this process takes part in it")


def test_a_torn_creation_is_told_and_removed():
    path = SHM / "shmx-00000000deadbeef"
    path.write_bytes(b"")
    assert seen("/" + path.name)["state"] == "torn"
    assert told(shmx.gc(dry_run=True), "/" + path.name)["outcome"] == "would be removed"
    assert path.exists()
    report = told(shmx.gc(), "/" + path.name)
    assert (report["outcome"], report["reason"]) == ("removed", "its creation was interrupted")
    assert not path.exists()


def test_data_segments_without_a_control_segment_are_removed_by_force_only():
    path = SHM / "shmx-00000000deadbeef.7"
    path.write_bytes(b"x" * 4096)
    name = "/" + path.stem
    assert seen(name)["state"] == "headless"
    for dry_run in (True, False):
        assert told(shmx.gc(dry_run=dry_run), name)["outcome"] == "not ours"
    assert told(shmx.gc(force=True, dry_run=True), name)["outcome"] == "would be removed"
    assert path.exists()
    assert told(shmx.gc(force=True), name) == {
        "name": name,
        "outcome": "removed",
        "reason": "data segments without a control segment",
        "bytes": 4096,
    }
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
@pytest.mark.parametrize("name", ["shmx-00000000deadbeef", "shmx-00000000deadbeef.7"])
def test_another_users_arena_is_named_and_left_alone(name):
    path = SHM / name
    path.write_bytes(b"")
    os.chown(path, 12345, 12345)
    try:
        found = seen("/" + path.stem)
        assert (found["state"], found["uid"]) == ("foreign", 12345)
        for dry_run in (True, False):
            report = told(shmx.gc(force=True, dry_run=dry_run), "/" + path.stem)
            assert (report["outcome"], report["reason"]) == ("not ours", "it belongs to user id 12345")
        assert path.exists()
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("offset", "value", "state"),
    [(0, b"\xff" * 8, "damaged"), (8, struct.pack("<I", 99), "other version"), (16, b"\x01" * 8, "damaged")],
    ids=["magic", "layout_version", "arena_id"],
)
@pytest.mark.needs_names
def test_a_control_segment_that_is_not_ours_to_read_is_told_and_left_alone(children, offset, value, state):
    name, _ = orphan(children)
    path = SHM / name.removeprefix("/")
    good = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    found = seen(name)
    assert found["state"] == state
    assert found["trouble"]
    assert "peers" not in found
    for dry_run in (True, False):
        report = told(shmx.gc(force=True, dry_run=dry_run), name)
        assert report["outcome"] == "not ours"
        assert found["trouble"] in report["reason"]
    with path.open("r+b") as file:
        file.write(good[: 1 << 16])
    assert told(shmx.gc(force=True), name)["outcome"] == "removed"


@pytest.mark.parametrize("length", [8, 100, 1 << 16])
@pytest.mark.needs_names
def test_a_truncated_control_segment_is_told_and_left_alone(children, length):
    name, _ = orphan(children)
    path = SHM / name.removeprefix("/")
    os.truncate(path, length)
    assert seen(name)["state"] == "damaged"
    for dry_run in (True, False):
        assert told(shmx.gc(force=True, dry_run=dry_run), name)["outcome"] == "not ours"
    for file in SHM.glob(path.name + "*"):
        file.unlink()


# ---- logs


def test_quiet_by_default():
    (handler,) = logging.getLogger("shmx").handlers
    assert isinstance(handler, logging.NullHandler)


def test_an_arena_is_logged_when_it_is_made_and_removed(caplog):
    with caplog.at_level(logging.INFO, "shmx"):
        _core.take_removals()
        with shmx.Arena(capacity=1 << 20) as arena:
            name = arena.name
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        f"arena {name} made",
        f"arena {name} removed",
    ]
    assert {record.levelno for record in caplog.records} == {logging.INFO}


@pytest.mark.needs_names
def test_an_orphan_that_the_next_arena_reaps_is_logged(caplog, children):
    name, _ = orphan(children)
    with caplog.at_level(logging.INFO, "shmx"):
        shmx.Arena(capacity=1 << 20).close()
    assert f"arena {name} reaped: its owner was gone and nobody used it" in caplog.text


def test_an_expired_message_is_logged_and_warned_of(caplog):
    with shmx.Arena(capacity=BLOCK, segment_bytes=BLOCK, ticket_ttl=0) as arena:
        handle = arena.share(pattern(1))
        pickle.dumps(handle)
        handle.release()
        with caplog.at_level(logging.WARNING, "shmx"), pytest.warns(RuntimeWarning, match="gave up a message"):
            arena.share(torch.zeros(BLOCK // 4)).release()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("shmx", logging.WARNING)
    assert "gave up a message" in record.getMessage()
