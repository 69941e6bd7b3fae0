"""Somebody outside shmx removes an arena's control segment: what has it goes on, the rest is told, nothing leaks."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

import shmx
from tests.blocks import names_of
from tests.patterns import BLOCK, is_pattern, pattern
from tests.peer import PeerRaised
from tests.peer import start_peer_fixture as start_peer_fixture

SHM = Path("/dev/shm")

pytestmark = pytest.mark.skipif(os.environ.get("SHMX_BACKEND") == "memfd", reason="an arena without names loses none")


def control_of(name: str) -> Path:
    return SHM / name.removeprefix("/")


def dumps(handle: shmx.SharedTensor, readers: int) -> bytes:
    with shmx.readers(readers):
        return pickle.dumps(handle)


def test_the_owner_and_its_peers_go_on_and_newcomers_are_told(start_peer):
    """Rules 1, 2 and 5."""
    member, newcomer = start_peer(), start_peer()
    with shmx.Arena(capacity=64 * BLOCK, segment_bytes=4 * BLOCK) as arena:
        first = arena.share(pattern(1))
        assert member.load("first", dumps(first, 1)) is None
        control_of(arena.name).unlink()

        more = [arena.share(pattern(seed)) for seed in range(2, 12)]  # in segments that are made only now
        blobs = [dumps(handle, 2) for handle in more]
        for seed, blob in enumerate(blobs, start=2):
            assert member.load(str(seed), blob) is None
            assert member.check(str(seed), seed)
        assert newcomer.load("late", blobs[0]) == "SegmentLostError"
        assert newcomer.attached() == []
        with pytest.raises(PeerRaised, match=r"SegmentLostError: .*" + arena.name + r".* is gone"):
            newcomer.view("late")
        assert member.check("first", 1)

        for handle in (first, *more):
            handle.release()
        member.kill()
        assert arena.stats()["held_blocks"] >= 11
        assert arena.trim() == 0  # the loads that the newcomer could not make
        assert shmx.gc() is not None
        for blob in blobs:
            assert shmx.discard(blob) == 1
        assert arena.trim() > 0
        assert arena.share(pattern(99)).is_available
    assert not names_of(arena)


def test_the_rest_is_headless_and_goes_with_its_owner(start_peer):
    observer = start_peer()
    with shmx.Arena(capacity=64 * BLOCK) as arena:
        handle = arena.share(pattern(1))
        control_of(arena.name).unlink()
        outcomes = {entry["name"]: entry["outcome"] for entry in observer.gc()}
        assert outcomes[arena.name] == "not ours"
        (seen,) = [one for one in shmx.arenas() if one["name"] == arena.name]
        assert seen["state"] == "headless"
        assert is_pattern(handle.view(), 1)
        del handle
    assert not names_of(arena)


def test_names_that_somebody_else_then_forces_away_are_told_where_they_are_needed(start_peer):
    """gc(force=True) elsewhere takes data without a control segment for what nobody can attach to."""
    observer = start_peer()
    with shmx.Arena(capacity=64 * BLOCK) as arena:
        held = [arena.share(pattern(seed)) for seed in range(2)]
        control_of(arena.name).unlink()
        observer.gc(force=True)
        assert not names_of(arena)
        with pytest.raises(shmx.SegmentLostError, match=arena.name + r".*lost its name.*outside shmx") as raised:
            while len(held) < 64:
                held.append(arena.share(pattern(len(held))))
        assert raised.value.errno == errno.ENOENT
        assert all(is_pattern(handle.view(), seed) for seed, handle in enumerate(held))
        held.pop().release()
        assert is_pattern(arena.share(pattern(9)).view(), 9)  # what is there already serves on
        held.clear()
    assert not names_of(arena)


def test_an_owner_that_is_killed_leaves_what_gc_by_force_removes(start_peer, segments):
    """Rule 7."""
    owner = start_peer()
    owner.share("a", 1)
    name = owner.arena()
    control_of(name).unlink()
    owner.kill()
    assert segments()
    assert {entry["name"]: entry["outcome"] for entry in shmx.gc()}[name] == "not ours"
    assert {entry["name"]: entry["outcome"] for entry in shmx.gc(force=True)}[name] == "removed"
    assert not segments()


def test_an_owner_that_ends_in_order_leaves_nothing(start_peer, segments):
    owner = start_peer()
    owner.share("a", 1)
    control_of(owner.arena()).unlink()
    assert owner.end("return") == 0
    assert not segments()


def test_a_member_keeps_what_it_holds_when_the_owner_ends(start_peer, segments):
    """Rule 1."""
    owner, member = start_peer(), start_peer()
    owner.share("a", 1)
    assert member.load("a", owner.pickle("a", 1)) is None
    control_of(owner.arena()).unlink()
    owner.end("return")
    assert member.check("a", 1)
    member.drop("a")
    member.end("return")
    shmx.gc(force=True)
    assert not segments()


def test_a_child_forked_then_has_no_slot_to_take_and_says_what_happened(start_peer):
    """Rule 10: better an error than other data."""
    parent = start_peer(spares=1)
    parent.share("a", 1)
    name = parent.arena()
    control_of(name).unlink()
    child = parent.forked()
    with pytest.raises(PeerRaised, match=name) as raised:
        child.check("a", 1)
    assert raised.value.name == "SegmentLostError"
    assert "when this process was forked" in str(raised.value)
    assert parent.check("a", 1)
