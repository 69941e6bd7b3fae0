"""How long bytes live: holds, announced and unannounced loads, release, revocation, time-to-live (rules 1 to 5, 8)."""

from __future__ import annotations

import gc
import pickle
import random
import time
import warnings

import numpy as np
import pytest
import torch

import shmx
from tests.blocks import block_of, generation_of, messages
from tests.patterns import BLOCK, is_pattern, pattern, press, small_arena
from tests.peer import PeerRaised
from tests.peer import start_peer_fixture as start_peer_fixture

TICK_S = 1 / 64


def dumps(handle, readers):
    with shmx.readers(readers):
        return pickle.dumps(handle)


# ---- holds ----


def test_held_bytes_survive_the_owner_s_release_and_pressure(start_peer):
    """Rules 1 and 2."""
    peer = start_peer()
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        peer.load("a", dumps(handle, 1))
        peer.view("a")
        del handle
        for _ in range(3):
            assert press(arena) == 15
            assert peer.check("a", 1)
        peer.drop("a")
        assert press(arena) == 16


def test_a_handle_alone_holds_its_block(start_peer):
    """Rule 1: nothing has been mapped or viewed when the pressure comes."""
    peer = start_peer()
    with small_arena() as arena:
        assert peer.decode("a", dumps(arena.share(pattern(1)), 1))
        assert press(arena) == 15
        assert peer.check("a", 1)


def test_every_alias_of_a_view_keeps_the_hold():
    """Rules 1 and 8."""
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        alias = handle.view()[8:].unsqueeze(0)
        handle.release()
        del handle
        assert press(arena) == 15
        assert torch.equal(alias[0], pattern(1)[8:])
        array = alias.numpy()
        del alias
        assert press(arena) == 15
        assert np.array_equal(array[0], pattern(1)[8:].numpy())
        of_array = torch.from_numpy(array)
        del array
        assert press(arena) == 15
        assert torch.equal(of_array[0], pattern(1)[8:])
        del of_array
        assert press(arena) == 16


def test_a_view_in_a_peer_outlives_the_release_of_its_handle(start_peer):
    """Rule 8."""
    peer = start_peer()
    with small_arena() as arena:
        peer.load("a", dumps(arena.share(pattern(1)), 1))
        peer.view("a")
        peer.release("a")
        assert peer.error("a") == "ReleasedError"
        assert press(arena) == 15
        assert peer.check("a", 1)


def test_a_materialized_tensor_keeps_no_hold(start_peer):
    """Rule 8: the copy is the receiver's own."""
    peer = start_peer()
    with small_arena() as arena:
        peer.load("a", dumps(arena.share(pattern(1)), 1))
        assert peer.materialize("a", 1)
        peer.drop("a")
        assert press(arena) == 16


def test_release_is_idempotent_per_handle():
    """Rule 8: a second release takes nothing from another handle of the block."""
    with small_arena() as arena:
        first = arena.share(pattern(1))
        second = pickle.loads(dumps(first, 1))
        assert block_of(first) == block_of(second)
        for _ in range(3):
            first.release()
        with first:
            pass
        assert press(arena) == 15
        assert is_pattern(second.view(), 1)
        with second:
            assert second.is_available
        assert press(arena) == 16
        with pytest.raises(shmx.ReleasedError):
            first.view()


def test_copies_of_a_handle_hold_on_their_own(start_peer):
    """Rule 8: copy.copy, with_readers and a second load are handles of their own."""
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        bound = handle.with_readers(1)
        handle.release()
        assert press(arena) == 15
        assert is_pattern(bound.view(), 1)
        bound.release()
        assert press(arena) == 16


# ---- announced loads ----


def test_announced_loads_succeed_late_and_in_any_order(start_peer):
    """Rule 2: across 200 reuses of the other blocks, by two processes that know nothing of each other."""
    order = random.Random(2)
    peers = [start_peer() for _ in range(2)]
    with small_arena() as arena:
        blobs = {seed: dumps(arena.share(pattern(seed)), 2) for seed in range(8)}
        loads = [(peer, seed) for peer in peers for seed in blobs]
        order.shuffle(loads)
        for peer, seed in loads:
            press(arena)
            for _ in range(12):
                arena.share(torch.zeros(BLOCK // 4)).release()
            assert peer.load("a", blobs[seed]) is None
            assert peer.check("a", seed)
            peer.drop("a")
        assert arena.stats()["reused"] >= 180
        assert press(arena) == 16


def test_a_message_loaded_too_often_takes_nothing_from_another(start_peer):
    """Rule 2: two messages of one block; the first is loaded five times instead of once."""
    greedy, patient = start_peer(), start_peer()
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        first, second = dumps(handle, 1), dumps(handle, 2)
        handle.release()
        for _ in range(5):
            assert greedy.load("a", first) is None
            greedy.drop("a")
        for _ in range(2):
            assert press(arena) == 15
            assert patient.load("a", second) is None
            assert patient.check("a", 1)
            patient.drop("a")
        assert press(arena) == 16
        assert patient.load("a", second) == "StaleHandleError"


def test_a_message_of_an_earlier_use_takes_nothing_from_a_later_one(start_peer):
    """Rule 2: the block and the cell are the same, the generation and the tag are not."""
    peer = start_peer()
    with small_arena(blocks=1) as arena:
        old = dumps(arena.share(pattern(1)), 1)
        peer.load("a", old)
        peer.drop("a")
        new = dumps(arena.share(pattern(2)), 1)
        for _ in range(3):
            assert peer.load("a", old) == "StaleHandleError"
        assert press(arena) == 0
        assert peer.load("b", new) is None
        assert peer.check("b", 2)


def test_each_of_several_messages_of_one_handle_is_announced(start_peer):
    """Rule 2: what breaks n > 1 sampling elsewhere, where the first receiver unlinks."""
    peers = [start_peer() for _ in range(3)]
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        blobs = [pickle.dumps(handle) for _ in peers]
        handle.release()
        for peer, blob in zip(peers, blobs, strict=True):
            assert press(arena) == 15
            assert peer.load("a", blob) is None
            assert peer.check("a", 1)
            peer.drop("a")


def test_a_handle_hops_over_three_processes_after_its_producer_let_go(start_peer):
    """Rules 2 and 4: every hop pickles again and releases before the next one loads."""
    peers = [start_peer() for _ in range(3)]
    with small_arena() as arena:
        blob = dumps(arena.share(pattern(1)), 1)
        for _ in range(3):
            for peer in peers:
                assert press(arena) == 15
                assert peer.load("a", blob) is None
                assert peer.check("a", 1)
                blob = peer.pickle("a", 1)
                peer.drop("a")
        assert press(arena) == 15
        assert shmx.discard(blob) == 1
        assert press(arena) == 16


def test_a_discarded_message_no_longer_keeps_its_block():
    """Rule 2: only what is still to be loaded is kept."""
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        blobs = [dumps(handle, 3) for _ in range(2)]
        handle.release()
        assert shmx.discard(blobs[0]) == 1
        assert press(arena) == 15
        assert shmx.discard(blobs[1]) == 1
        assert shmx.discard(blobs[1]) == 0
        assert press(arena) == 16


def test_an_exception_inside_readers_takes_its_messages_back():
    """Rule 2: the message was not sent, so nothing waits for it."""
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        with pytest.raises(KeyError), shmx.readers(4):
            pickle.dumps(handle)
            raise KeyError
        handle.release()
        assert press(arena) == 16


# ---- unannounced loads ----


def test_an_unannounced_load_succeeds_until_the_block_is_reused(start_peer):
    """Rule 3."""
    peer = start_peer()
    with small_arena() as arena:
        blob = dumps(arena.share(pattern(1)), 0)
        for _ in range(4):
            arena.share(torch.zeros(BLOCK // 4)).release()
            assert peer.load("a", blob) is None
            assert peer.check("a", 1)
            peer.drop("a")
        assert press(arena) == 16
        assert peer.load("a", blob) == "StaleHandleError"


def test_a_stale_handle_is_never_other_data(start_peer):
    """Rule 3: hundreds of loads of handles that may or may not have been reused; each is right or an error."""
    order = random.Random(3)
    peers = [start_peer() for _ in range(2)]
    with small_arena(blocks=4) as arena:
        blobs: dict[int, bytes] = {}
        stale = right = 0
        for seed in range(200):
            blobs[seed] = dumps(arena.share(pattern(seed)), 0)
            for _ in range(2):
                chosen = order.randrange(max(0, seed - 12), seed + 1)
                peer = order.choice(peers)
                error = peer.load("a", blobs[chosen])
                if error is None:
                    assert peer.check("a", chosen)
                    right += 1
                else:
                    assert error == "StaleHandleError"
                    stale += 1
        assert stale > 20
        assert right > 20


# ---- pickling ----


def test_pickling_128_mib_makes_no_segment_and_copies_no_bytes(segments):
    """Rule 4."""
    with shmx.Arena(capacity=160 << 20) as arena:
        handle = arena.share(arena.empty((128 << 20,), dtype=torch.uint8))
        names, reserved = segments(), arena.stats()["reserved_bytes"]
        address = handle.view().data_ptr()
        for protocol in (2, 3, 4, 5):
            blob = pickle.dumps(handle, protocol)
            assert len(blob) < 200
            again = pickle.loads(blob)
            assert again.view().data_ptr() == address
            assert pickle.loads(pickle.dumps(again)).view().data_ptr() == address
        assert segments() == names
        assert arena.stats()["reserved_bytes"] == reserved
        assert messages(arena) == 0


def test_pickling_a_released_handle_carries_the_reason(start_peer):
    """Rules 4 and 5."""
    peer = start_peer()
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        handle.release()
        blob = pickle.dumps(handle)
        assert not pickle.loads(blob).is_available
        assert peer.load("a", blob) == "ReleasedError"
        assert peer.load("b", peer.pickle("a")) == "ReleasedError"


def test_one_lost_tensor_does_not_spoil_the_decoding_of_a_batch(start_peer):
    """Rule 5."""
    with small_arena() as arena:
        kept, lost = arena.share(pattern(1)), arena.share(pattern(2))
        with shmx.readers(1):
            batch = pickle.dumps([{"pixels": kept}, {"pixels": lost}, {"pixels": kept}])
        lost.revoke()
        first, second, third = pickle.loads(batch)
        assert is_pattern(first["pixels"].view(), 1)
        assert is_pattern(third["pixels"].view(), 1)
        assert not second["pixels"].is_available
        for use in (second["pixels"].view, second["pixels"].materialize):
            with pytest.raises(shmx.StaleHandleError):
                use()


# ---- revocation ----


def test_revocation_makes_loads_stale_at_once_and_leaves_holders_reading(start_peer):
    """Rules 1 and 2."""
    holder, late = start_peer(), start_peer()
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        blob = dumps(handle, 2)
        assert holder.load("a", blob) is None
        holder.view("a")
        handle.revoke()
        assert late.load("a", blob) == "StaleHandleError"
        assert not handle.is_available
        assert press(arena) == 15
        assert holder.check("a", 1)
        assert late.load("b", holder.pickle("a", 1)) == "StaleHandleError"
        holder.drop("a")
        assert press(arena) == 16


def test_a_consumer_cannot_revoke(start_peer):
    """Rule 2: only the owner takes back what it has announced."""
    peer = start_peer()
    with small_arena() as arena:
        blob = dumps(arena.share(pattern(1)), 2)
        peer.load("a", blob)
        with pytest.raises(PeerRaised, match="only the process that owns"):
            peer.revoke("a")
        peer.drop("a")
        assert press(arena) == 15
        assert peer.load("a", blob) is None
        assert peer.check("a", 1)


# ---- time-to-live ----


def test_an_old_message_is_given_up_under_pressure_and_only_then(start_peer):
    """Rule 2: with room a message lives as long as it takes; without, until it is as old as its time-to-live."""
    peer = start_peer()
    ttl = 0.05
    with small_arena(ticket_ttl=ttl) as arena:
        held = arena.share(pattern(1))
        begun = time.clock_gettime(time.CLOCK_BOOTTIME)
        roomy = dumps(arena.share(pattern(2)), 1)
        while time.clock_gettime(time.CLOCK_BOOTTIME) - begun < ttl + 2 * TICK_S:
            arena.share(torch.zeros(BLOCK // 4)).release()
        assert peer.load("a", roomy) is None
        assert peer.check("a", 2)
        peer.drop("a")

        begun = time.clock_gettime(time.CLOCK_BOOTTIME)
        blobs = [dumps(arena.share(pattern(seed)), 1) for seed in range(100, 115)]
        with pytest.warns(RuntimeWarning, match=f"arena {arena.name} needed room and gave up a message") as warned:
            while True:
                try:
                    pressing = arena.share(pattern(3))
                    break
                except shmx.ArenaFullError:
                    continue
        assert time.clock_gettime(time.CLOCK_BOOTTIME) - begun > ttl - TICK_S
        assert len(warned) == 1
        assert arena.stats()["expired_messages"] >= 1
        errors = [peer.load("a", blob) for blob in blobs]
        assert set(errors) <= {None, "StaleHandleError"}
        assert "StaleHandleError" in errors
        assert is_pattern(held.view(), 1)
        assert is_pattern(pressing.view(), 3)


def test_waiting_with_a_timeout_outlives_a_message(start_peer):
    """Rule 2: share(timeout=...) gets the room that an expired message gives back."""
    with small_arena(blocks=1, ticket_ttl=0.05) as arena:
        dumps(arena.share(pattern(1)), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert is_pattern(arena.share(pattern(2), timeout=60).view(), 2)


# ---- which block is used again ----


def test_an_unpatched_broadcast_loses_nothing_while_there_is_room(start_peer):
    """Rule 3 and reuse_delay: one pickle that announces one load, four loads one after another."""
    peers = [start_peer() for _ in range(4)]
    with small_arena(blocks=128, reuse_delay=300) as arena:
        for seed in range(4):
            handle = arena.share(pattern(seed))
            blob = pickle.dumps(handle)
            handle.release()
            for peer in peers:
                for _ in range(4):
                    arena.share(torch.zeros(BLOCK // 4)).release()
                assert peer.load("a", blob) is None
                assert peer.check("a", seed)
                peer.drop("a")


def test_without_room_an_unpatched_broadcast_is_stale_never_wrong(start_peer):
    """Rule 3: reuse_delay is a courtesy, not a promise."""
    peers = [start_peer() for _ in range(2)]
    with small_arena(reuse_delay=300) as arena:
        blob = pickle.dumps(arena.share(pattern(1)))
        assert peers[0].load("a", blob) is None
        assert peers[0].check("a", 1)
        peers[0].drop("a")
        assert press(arena) == 16
        assert peers[1].load("a", blob) == "StaleHandleError"


def test_an_explicit_announcement_reuses_the_hot_block_at_once(start_peer):
    """The block that the last load has let go of is the next one to be written."""
    peer = start_peer()
    with small_arena(reuse_delay=300) as arena:
        first = arena.share(pattern(1))
        block, generation = block_of(first), generation_of(first)
        blob = dumps(first, 1)
        first.release()
        peer.load("a", blob)
        peer.drop("a")
        second = arena.share(pattern(2))
        assert block_of(second) == block
        assert generation_of(second) == generation + 2
        blob = pickle.dumps(second)
        second.release()
        peer.load("a", blob)
        peer.drop("a")
        assert block_of(arena.share(pattern(3))) != block


def test_a_collected_handle_has_released(start_peer):
    """Rule 8: garbage cycles end holds too."""
    with small_arena() as arena:
        cycle = [arena.share(pattern(1)), arena.share(pattern(2)).view()]
        cycle.append(cycle)
        assert press(arena) == 14
        del cycle
        gc.collect()
        assert press(arena) == 16
