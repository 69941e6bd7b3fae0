"""Many threads on one arena (rules 1, 2, 3, 8): the private counts and the shared bits change together."""

from __future__ import annotations

import multiprocessing.util
import pickle
import queue
import random
import threading
import time

import pytest
import torch

import shmx
from tests.blocks import messages
from tests.patterns import BLOCK, is_pattern, pattern, press, small_arena
from tests.peer import start_peer_fixture as start_peer_fixture

JOIN_S = 120


def dumps(handle, readers):
    with shmx.readers(readers):
        return pickle.dumps(handle)


def run_all(*targets):
    """Run each target in a thread of its own; the first exception of any is raised here."""
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def guarded(target):
        try:
            target()
        except BaseException as error:
            failures.put(error)

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
        assert not thread.is_alive(), "a thread did not come back"
    if not failures.empty():
        raise failures.get()


def is_empty(arena):
    """Nothing holds a block and nothing waits for one: all memory can be given back."""
    reserved = arena.stats()["reserved_bytes"]
    return arena.stats()["held_blocks"] == 0 and arena.trim() == reserved


# ---- everything at once ----


def churn(arena, seed, rounds):
    """Share, announce, forward, load, view, copy and release at random; check whatever is read."""
    choose = random.Random(seed)
    kept: list[tuple[int, object]] = []
    for step in range(rounds):
        number = seed * 100_000 + step
        handle = arena.share(pattern(number, choose.choice([256, 4096, BLOCK])), timeout=JOIN_S)
        blobs = [dumps(handle, 1) for _ in range(choose.randrange(1, 4))]
        if choose.random() < 0.5:
            handle.release()
        for blob in blobs:
            loaded = pickle.loads(blob)
            kept.append((number, loaded.view() if choose.random() < 0.7 else loaded))
        while len(kept) > choose.randrange(8):
            number, one = kept.pop(choose.randrange(len(kept)))
            assert is_pattern(one if isinstance(one, torch.Tensor) else one.materialize(), number)


def test_threads_of_the_owner_share_pickle_load_view_and_release(segments):
    """Rules 1, 2 and 8, in one process that is owner and consumer at once."""
    with small_arena(blocks=128) as arena:
        run_all(*(lambda seed=seed: churn(arena, seed, 150) for seed in range(6)))
        assert messages(arena) == 0
        assert is_empty(arena)
    assert not segments()


def consume(connection, threads):
    """Load what comes, in several threads; every thread checks, forwards to itself and lets go in its own time."""
    torch.set_num_threads(1)
    work: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()

    def take():
        choose = random.Random()
        kept = []
        while (item := work.get()) is not None:
            seed, blob = item
            handle = pickle.loads(blob)
            if choose.random() < 0.3:
                handle = pickle.loads(dumps(handle, 1))
            kept.append((seed, handle.view()))
            while len(kept) > choose.randrange(6):
                seed, view = kept.pop(choose.randrange(len(kept)))
                assert is_pattern(view, seed)
        assert all(is_pattern(view, seed) for seed, view in kept)

    def receive():
        while (item := connection.recv()) is not None:
            work.put(item)
        for _ in range(threads):
            work.put(None)

    run_all(receive, *[take] * threads)


def test_threads_of_consumers_load_what_threads_of_the_owner_share(children, segments):
    """Rules 1 and 2: two consumers with four threads each; every message is loaded by both, in no order."""
    consumers = [children.start(consume, 4, method="fork") for _ in range(2)]
    sending = threading.Lock()
    with small_arena(blocks=64) as arena:

        def produce(seed):
            for step in range(150):
                number = seed * 100_000 + step
                blob = dumps(arena.share(pattern(number, 4096 << step % 5), timeout=JOIN_S), 2)
                with sending:
                    for consumer in consumers:
                        consumer.send((number, blob))

        run_all(*(lambda seed=seed: produce(seed) for seed in range(3)))
        for consumer in consumers:
            consumer.send(None)
            consumer.result()
        assert messages(arena) == 0
        assert is_empty(arena)
    assert not segments()


# ---- one block, several threads ----


def test_a_stale_load_does_not_clear_the_hold_of_another_thread():
    """Rule 8: the bit belongs to the process; a failed load takes it back only if nobody else has a use."""
    with small_arena(blocks=1) as arena:
        stale = dumps(arena.share(pattern(0)), 0)
        handle = arena.share(pattern(1))
        blob = dumps(handle, 2000)
        stop = threading.Event()
        wrong = []

        def load_stale():
            while not stop.is_set():
                if pickle.loads(stale).is_available:
                    wrong.append("stale, but loaded")

        def load_and_press():
            for _ in range(2000):
                view = pickle.loads(blob).view()
                with pytest.raises(shmx.ArenaFullError):
                    arena.share(pattern(2))
                assert is_pattern(view[:64], 1)
            stop.set()

        handle.release()
        try:
            run_all(load_stale, load_stale, load_and_press)
        finally:
            stop.set()
        assert not wrong


def test_a_consumer_s_stale_load_does_not_clear_the_hold_of_another_thread(children):
    """Rule 8, between processes: the owner presses while the consumer's threads load both kinds."""
    consumer = children.start(load_both_kinds, method="fork")
    with small_arena(blocks=1) as arena:
        stale = dumps(arena.share(pattern(0)), 0)
        consumer.send((stale, dumps(arena.share(pattern(1)), 1)))
        while not consumer.connection.poll(0):
            with pytest.raises(shmx.ArenaFullError):
                arena.share(pattern(2))
        assert consumer.receive() == []
        consumer.send(None)
        consumer.result()
        assert press(arena) == 1


def load_both_kinds(connection):
    stale, good = connection.recv()
    wrong = []
    view = pickle.loads(good).view()

    def load_stale():
        for _ in range(3000):
            handle = pickle.loads(stale)
            if handle.is_available or type(handle.error) is not shmx.StaleHandleError:
                wrong.append(repr(handle))

    def read():
        for _ in range(300):
            if not is_pattern(view, 1):
                wrong.append("other data")

    run_all(load_stale, load_stale, read)
    connection.send(wrong)
    connection.recv()


def test_threads_that_load_one_message_take_it_as_often_as_announced():
    """Rule 2: 4 threads, 400 loads in all, and not one left over or short."""
    with small_arena(blocks=2) as arena:
        handle = arena.share(pattern(1))
        blob, other = dumps(handle, 400), dumps(handle, 1)
        handle.release()

        def load():
            for _ in range(100):
                assert pickle.loads(blob).is_available

        run_all(load, load, load, load)
        assert messages(arena) == 1
        assert press(arena) == 1
        assert is_pattern(pickle.loads(other).view(), 1)
        assert press(arena) == 2


def test_views_are_dropped_by_threads_that_did_not_make_them():
    """Rule 8: the last use of a block may end anywhere."""
    with small_arena(blocks=4) as arena:
        handed: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()

        def drop():
            while (view := handed.get()) is not None:
                del view

        def make():
            for step in range(2000):
                handed.put(arena.share(pattern(step, 256), timeout=JOIN_S).view())
            handed.put(None)

        run_all(drop, make)
        assert arena.stats()["held_blocks"] == 0


# ---- a full arena ----


def test_shares_that_wait_for_room_all_get_it():
    """share(timeout=...) in many threads on an arena with room for two."""
    with small_arena(blocks=2) as arena:

        def work(seed):
            for step in range(40):
                number = seed * 1000 + step
                view = arena.share(pattern(number), timeout=JOIN_S).view()
                assert is_pattern(view, number)
                del view

        run_all(*(lambda seed=seed: work(seed) for seed in range(6)))
        assert press(arena) == 2


def test_a_share_that_waits_lets_other_threads_run_and_gives_up_in_time():
    """The wait holds neither the GIL nor the arena: the thread that makes room can do so."""
    with small_arena(blocks=1) as arena:
        held = [arena.share(pattern(1))]
        with pytest.raises(shmx.ArenaFullError):
            arena.share(pattern(2), timeout=0.05)

        def wait():
            assert is_pattern(arena.share(pattern(2), timeout=JOIN_S).view(), 2)

        def make_room():
            arena.stats()
            held.pop().release()

        run_all(wait, make_room)


# ---- leaving while others work ----


@pytest.mark.needs_names
def test_a_load_while_another_thread_collects(start_peer):
    """Rule 2: gc() leaves orphans in which nothing is held; a load that comes just then joins again."""
    producer = start_peer()
    producer.share("a", 1, 512)
    blob = producer.pickle("a", 4000)
    producer.end()
    stop = threading.Event()
    lost = []

    def collect():
        while not stop.is_set():
            shmx.gc()

    def load():
        choose = random.Random(5)
        for _ in range(4000):
            handle = pickle.loads(blob)
            if not (handle.is_available and is_pattern(handle.view(), 1)):
                lost.append(repr(handle.error))
            del handle
            # Not a synchronisation: a moment in which nothing is held, of any length.
            until = time.perf_counter() + choose.random() * 2e-4
            while time.perf_counter() < until:
                time.sleep(0)
        stop.set()

    try:
        run_all(collect, load)
    finally:
        stop.set()
    assert lost == []


def test_a_load_of_a_message_while_another_thread_closes_the_arena():
    """Rule 2: the owner's own load may come before, while or after it leaves."""
    for seed in range(300):
        arena = shmx.Arena(capacity=1 << 16)
        handle = arena.share(pattern(seed, 512))
        blob = dumps(handle, 1)
        handle.release()
        both = threading.Barrier(2)
        found = []

        def close(arena=arena, both=both):
            both.wait()
            arena.close()

        def load(blob=blob, both=both, found=found):
            both.wait()
            found.append(pickle.loads(blob))

        run_all(close, load)
        assert found[0].error is None, found[0]
        assert is_pattern(found[0].view(), seed)


# ---- the end of a multiprocessing child ----


def leave_a_thread_behind(connection, blob):
    view = pickle.loads(blob).view()

    def read_on():
        connection.recv()
        connection.send("right" if is_pattern(view, 1) else "other data")

    threading.Thread(target=read_on).start()
    # Called after shmx's own finalizer, which has priority -1000.
    multiprocessing.util.Finalize(None, connection.send, args=("finalized",), exitpriority=-2000)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_thread_that_outlives_its_process_s_target_keeps_its_hold(children, method):
    """Rule 1: multiprocessing waits for threads that are not daemons, and they go on reading."""
    with small_arena() as arena:
        child = children.start(leave_a_thread_behind, dumps(arena.share(pattern(1)), 1), method=method)
        assert child.receive() == ("result", None)
        # Whether its finalizers wait for the thread is their business: give them the time not to.
        said = [child.receive()] if child.connection.poll(1) else []
        press(arena)
        child.send(None)
        while "finalized" not in said or len(said) < 2:
            said.append(child.receive())
        assert "right" in said
        child.join()
