"""Processes in an arena: slots, attaching, mapping, kills, stops, daemonizers (rules 1 and 6)."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys

import pytest
import torch

import shmx
from tests.blocks import names_of
from tests.patterns import BLOCK, is_pattern, pattern, press, small_arena
from tests.peer import control_file, lock_slot, taken_slots
from tests.peer import start_peer_fixture as start_peer_fixture

CONSUMERS = shmx._core.MAX_PEERS - 1


def dumps(handle, readers):
    with shmx.readers(readers):
        return pickle.dumps(handle)


# ---- slots ----


def test_the_65th_process_is_told_so_and_a_killed_one_makes_room(start_peer):
    """Rule 6, and rule 5: unpickling does not raise, the view does; the announced load is still there afterwards."""
    peers = [start_peer() for _ in range(CONSUMERS + 1)]
    with small_arena() as arena:
        blob = dumps(arena.share(pattern(1)), CONSUMERS + 1)
        for peer in peers[:-1]:
            assert peer.load("a", blob) is None
        assert taken_slots(arena.name) == list(range(64))
        late = peers[-1]
        assert not late.decode("a", blob)
        assert late.error("a") == "TooManyPeersError"
        assert late.load("b", late.pickle("a")) == "TooManyPeersError"
        assert late.attached() == []
        assert arena.stats()["messages"] == 1

        peers[17].kill()
        assert taken_slots(arena.name) == [slot for slot in range(64) if slot != 18]
        assert late.load("a", blob) is None
        assert late.check("a", 1)
        assert arena.stats()["messages"] == 0
        assert taken_slots(arena.name) == list(range(64))
        assert all(peer.check("a", 1) for peer in (*peers[:17], *peers[18:]))


@pytest.mark.needs_names
def test_too_many_peers_is_an_oserror_that_says_what_to_do():
    """Rule 5: here the slots are taken by locks alone."""
    with small_arena() as arena:
        blob = dumps(arena.share(pattern(1)), 1)
        arena.close()
        with open(control_file(arena.name), "r+b", buffering=0) as file:
            for slot in range(1, 64):
                lock_slot(file.fileno(), slot)
            handle = pickle.loads(blob)
            for use in (handle.view, handle.materialize):
                with pytest.raises(shmx.TooManyPeersError, match="64 processes attached") as raised:
                    use()
                assert raised.value.errno == 87  # EUSERS
        again = pickle.loads(blob)
        assert is_pattern(again.view(), 1)


def test_a_peer_attaches_once(start_peer):
    """One slot and one entry per arena and process, whatever it loads."""
    peer = start_peer()
    with small_arena() as arena, small_arena() as other:
        for seed in range(8):
            assert peer.load(f"a{seed}", dumps(arena.share(pattern(seed)), 1)) is None
            assert peer.attached() == [arena.name]
        assert taken_slots(arena.name) == [0, 1]
        assert peer.load("b", dumps(other.share(pattern(9)), 1)) is None
        assert sorted(peer.attached()) == sorted([arena.name, other.name])
        assert taken_slots(other.name) == [0, 1]
        for seed in range(8):
            peer.drop(f"a{seed}")
        assert taken_slots(arena.name) == [0, 1]


def test_a_peer_that_ends_gives_its_slot_and_its_holds_back(start_peer):
    """Rule 6: without a sweep when it ends in order, by the sweep otherwise."""
    with_views = [start_peer() for _ in range(3)]
    with small_arena() as arena:
        blob = dumps(arena.share(pattern(1)), 3)
        for peer, how in zip(with_views, ("return", "os._exit", "kill"), strict=True):
            peer.load("a", blob)
            peer.view("a")
            assert taken_slots(arena.name) == [0, 1]
            peer.end(how)
            assert taken_slots(arena.name) == [0]
            assert arena.stats()["held_blocks"] == (0 if how == "return" else 1)
        assert press(arena) == 16
        assert arena.stats()["dead_peers_swept"] == 1  # they all had slot 1


# ---- kills and stops ----


def test_a_killed_peer_loses_its_own_holds_and_no_others(start_peer):
    """Rule 6."""
    victim, survivor = start_peer(), start_peer()
    with small_arena() as arena:
        for seed in range(8):
            blob = dumps(arena.share(pattern(seed)), 2)
            if seed < 6:
                assert victim.load(f"a{seed}", blob) is None
            else:
                shmx.discard(blob)
            if seed >= 4:
                assert survivor.load(f"a{seed}", dumps(pickle.loads(blob), 1)) is None
            else:
                shmx.discard(blob)
        assert press(arena) == 8
        victim.kill()
        assert press(arena) == 12
        assert all(survivor.check(f"a{seed}", seed) for seed in range(4, 8))
        assert arena.stats()["dead_peers_swept"] == 1


def test_room_held_by_a_killed_peer_is_found_before_the_arena_grows(start_peer):
    """Rule 6: without it the arena would have to reserve as much again."""
    victim = start_peer()
    with shmx.Arena(capacity=256 << 20, segment_bytes=64 << 20) as arena:
        blobs = [dumps(arena.share(torch.zeros(1 << 20, dtype=torch.uint8)), 1) for _ in range(32)]
        for index, blob in enumerate(blobs):
            victim.load(str(index), blob)
        reserved = arena.stats()["reserved_bytes"]
        victim.kill()
        held = [arena.share(torch.zeros(1 << 20, dtype=torch.uint8)) for _ in range(32)]
        assert arena.stats()["reserved_bytes"] < 1.5 * reserved
        assert arena.stats()["dead_peers_swept"] == 1
        assert arena.stats()["held_blocks"] == len(held)


def test_a_stopped_peer_keeps_its_holds(start_peer):
    """Rule 1: SIGSTOP is not death."""
    stopped = start_peer()
    with small_arena() as arena:
        stopped.load("a", dumps(arena.share(pattern(1)), 1))
        stopped.view("a")
        stopped.stop()
        shmx.gc(force=True)
        assert press(arena) == 15
        assert arena.stats()["dead_peers_swept"] == 0
        stopped.resume()
        assert stopped.check("a", 1)


def load_and_let_go(connection):
    while True:
        blobs = connection.recv()
        held = []
        for blob in blobs:
            held.append(pickle.loads(blob))
            if len(held) > 2:
                assert held.pop(0).view()[0].item() is not None
        connection.send(None)


def test_peers_killed_anywhere_in_a_load_give_everything_back(children):
    """Rule 6: 40 kills in the middle of loads and releases."""
    moment = random.Random(6)
    with small_arena() as arena:
        for _ in range(40):
            # A forked child inherits the holds of this process: it has none here.
            peer = children.start(load_and_let_go, method="fork")
            blobs = [dumps(arena.share(pattern(seed)), 1) for seed in range(8)]
            peer.send(blobs * moment.randrange(1, 40))
            peer.connection.poll(moment.random() * 3e-3)
            peer.kill()
            for blob in blobs:
                shmx.discard(blob)
        assert press(arena) == 16
        assert taken_slots(arena.name) == [0]


# ---- mapping ----


@pytest.mark.needs_names
def test_data_segments_are_mapped_at_first_use(start_peer):
    """Decoding a batch maps nothing; a view maps the one segment that it lies in."""
    peer = start_peer()
    with shmx.Arena(capacity=8 * BLOCK, segment_bytes=4 * BLOCK) as arena:
        handles = [arena.share(pattern(seed)) for seed in range(8)]
        assert len(names_of(arena)) == 3
        for seed, handle in enumerate(handles):
            assert peer.decode(f"a{seed}", dumps(handle, 1))
        assert peer.mapped() == []
        assert peer.check("a0", 0)
        assert peer.mapped() == [f"{arena.name[1:]}.1"]
        assert peer.check("a1", 1)
        assert len(peer.mapped()) == 1
        assert peer.check("a7", 7)
        assert sorted(peer.mapped()) == [f"{arena.name[1:]}.1", f"{arena.name[1:]}.2"]


def test_attach_maps_all_segments(start_peer):
    peer = start_peer()
    with shmx.Arena(capacity=12 * BLOCK, segment_bytes=4 * BLOCK) as arena:
        handles = [arena.share(pattern(seed)) for seed in range(12)]
        assert peer.decode("a", dumps(handles[5], 1))
        peer.attach("a")
        assert sorted(peer.mapped()) == [f"{arena.name[1:]}.{segment}" for segment in (1, 2, 3)]
        assert peer.check("a", 5)


def test_a_trimmed_segment_is_unmapped_by_its_peers(start_peer):
    """Rule 1 from the other side: only what nobody holds is trimmed, and the memory really goes."""
    peer = start_peer()
    with shmx.Arena(capacity=8 * BLOCK, segment_bytes=4 * BLOCK) as arena:
        handles = [arena.share(pattern(seed)) for seed in range(8)]
        for seed in (0, 7):
            assert peer.load(f"a{seed}", dumps(handles[seed], 1)) is None
        assert len(peer.mapped()) == 2
        del handles
        assert arena.trim() == 0
        peer.drop("a7")
        assert arena.trim() == 4 * BLOCK
        assert peer.load("b", dumps(arena.share(pattern(3)), 1)) is None
        assert peer.check("b", 3)
        assert peer.check("a0", 0)
        assert peer.mapped() == [f"{arena.name[1:]}.1"]


# ---- daemonizers ----


def test_a_consumer_whose_descriptors_were_all_closed_keeps_its_holds(start_peer):
    """Rule 1: the slot does not hang on a descriptor, and a foreign file under the old number is left alone."""
    peer = start_peer()
    with small_arena() as arena:
        peer.load("a", dumps(arena.share(pattern(1)), 1))
        assert peer.close_descriptors() in ([f"/dev/shm{arena.name}"], [f"/memfd:{arena.name[1:]} (deleted)"])
        foreign = peer.intact_descriptors()
        assert foreign >= 64
        assert press(arena) == 15
        assert taken_slots(arena.name) == [0, 1]
        assert peer.check("a", 1)
        assert peer.load("b", dumps(arena.share(pattern(2)), 1)) is None
        assert peer.check("b", 2)
        peer.drop("a")
        peer.drop("b")
        peer.gc()
        assert peer.intact_descriptors() == foreign
        assert press(arena) == 16


@pytest.mark.needs_names
def test_an_owner_whose_descriptors_were_all_closed_goes_on(start_peer, segments):
    """Rules 1 and 7: it sweeps, grows and ends in order."""
    owner, consumer, victim = start_peer(), start_peer(), start_peer()
    owner.configure(capacity=16 * BLOCK, segment_bytes=4 * BLOCK)
    owner.share("a", 1)
    owner.close_descriptors()
    foreign = owner.intact_descriptors()
    assert taken_slots(owner.arena()) == [0]
    assert consumer.load("a", owner.pickle("a", 1)) is None
    assert victim.load("a", owner.pickle("a", 1)) is None
    owner.drop("a")
    consumer.drop("a")
    assert owner.press() == 15
    victim.kill()
    assert owner.press() == 16
    owner.share("b", 2)
    assert consumer.load("b", owner.pickle("b", 1)) is None
    assert owner.intact_descriptors() == foreign
    owner.end()
    assert consumer.check("b", 2)
    consumer.drop("b")
    assert not segments()


def test_a_daemon_made_by_fork_and_closerange_keeps_what_it_inherited(start_peer):
    """Rules 1 and 10."""
    peer = start_peer(spares=1)
    with small_arena() as arena:
        peer.load("a", dumps(arena.share(pattern(1)), 1))
        peer.view("a")
        daemon = peer.forked()
        daemon.close_descriptors()
        peer.kill()
        assert press(arena) == 15
        assert daemon.check("a", 1)
        daemon.drop("a")
        assert press(arena) == 16


# ---- the end of a peer ----

READ_AT_EXIT = """
import atexit, sys

def read():
    sys.stdout.write("leaving\\n")
    sys.stdout.flush()
    sys.stdin.buffer.readline()
    sys.stdout.write("right" if is_pattern(view, 1) else "other data")

atexit.register(read)  # first registered, last run
import pickle
from tests.patterns import is_pattern

view = pickle.load(sys.stdin.buffer).view()
"""


def test_a_view_is_right_until_its_process_has_ended():
    """Rule 1: a peer that runs its last handlers is still alive."""
    with (
        small_arena() as arena,
        subprocess.Popen([sys.executable, "-c", READ_AT_EXIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peer,
    ):
        try:
            peer.stdin.write(dumps(arena.share(pattern(1)), 1))
            peer.stdin.flush()
            assert peer.stdout.readline() == b"leaving\n"
            press(arena)
            answer, _ = peer.communicate(b"go on\n", timeout=120)
        finally:
            peer.kill()
    assert answer == b"right"


@pytest.mark.needs_names
def test_pids_are_for_people_only(start_peer):
    """Rule 6: the message of a full arena names the process that holds most of it."""
    peer = start_peer()
    with small_arena() as arena:
        for seed in range(16):
            peer.load(str(seed), dumps(arena.share(pattern(seed)), 1))
        with pytest.raises(shmx.ArenaFullError, match=rf"pid {peer.pid}: 1\.0 MiB") as raised:
            arena.share(pattern(0))
        assert raised.value.errno == 28  # ENOSPC
        assert os.path.exists(f"/dev/shm{arena.name}")
