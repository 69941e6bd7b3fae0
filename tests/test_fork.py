"""What a forked child owns, and what it leaves alone (rules 10 and 11)."""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

import shmx
from tests.blocks import names_of
from tests.children import BOUND
from tests.patterns import BLOCK, is_pattern, pattern, press, small_arena
from tests.peer import process_ended, taken_slots
from tests.peer import start_peer_fixture as start_peer_fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CONSUMERS = shmx._core.MAX_PEERS - 1


def dumps(handle, readers):
    with shmx.readers(readers):
        return pickle.dumps(handle)


# ---- what the child inherits ----


def test_a_consumer_s_child_keeps_handles_and_views_whatever_the_parent_does(start_peer):
    """Rule 10: release, an end in order, a kill."""
    for ending in ("return", "kill"):
        parent = start_peer(spares=1)
        with small_arena() as arena:
            for seed in (1, 2):
                parent.load(f"a{seed}", dumps(arena.share(pattern(seed)), 1))
            parent.view("a1")
            child = parent.forked()
            assert taken_slots(arena.name) == [0, 1, 2]
            parent.drop("a1")
            parent.drop("a2")
            assert press(arena) == 14
            assert child.check("a1", 1)
            assert child.check("a2", 2)
            parent.end(ending)
            assert taken_slots(arena.name) == [0, 2]
            assert press(arena) == 14
            assert child.check("a1", 1)
            child.drop("a1")
            assert press(arena) == 15
            assert child.check("a2", 2)
            child.end()
            assert process_ended(child.pid)
        shmx.gc()
        assert not names_of(arena)


@pytest.mark.needs_names
def test_an_owner_s_child_keeps_handles_and_views_whatever_the_owner_does(start_peer, segments):
    """Rules 7 and 10: the child of a producer that was killed goes on reading, and sends handles on."""
    owner, consumer = start_peer(spares=1), start_peer()
    owner.configure(capacity=16 * BLOCK, segment_bytes=16 * BLOCK)
    owner.share("a", 1)
    owner.view("a")
    owner.share("b", 2)
    child = owner.forked()
    name = owner.arena()
    owner.drop("a")
    owner.drop("b")
    assert owner.press() == 14
    owner.end("kill")
    assert child.check("a", 1)
    assert child.check("b", 2)
    shmx.gc(force=True)
    assert taken_slots(name) == [1]
    assert consumer.load("a", child.pickle("a", 1)) is None
    assert consumer.check("a", 1)
    consumer.drop("a")
    child.drop("a")
    child.drop("b")
    shmx.gc()
    assert not segments()


def test_a_child_s_release_is_its_own(start_peer):
    """Rules 8 and 10."""
    parent = start_peer(spares=1)
    with small_arena() as arena:
        parent.load("a", dumps(arena.share(pattern(1)), 1))
        parent.view("a")
        child = parent.forked()
        child.drop("a")
        assert press(arena) == 15
        assert parent.check("a", 1)
        child.end()
        assert press(arena) == 15
        assert parent.check("a", 1)
        parent.drop("a")
        assert press(arena) == 16


def test_a_killed_child_loses_its_own_holds_only(start_peer):
    """Rules 6 and 10."""
    parent = start_peer(spares=1)
    with small_arena() as arena:
        parent.load("a", dumps(arena.share(pattern(1)), 1))
        child = parent.forked()
        child.load("b", dumps(arena.share(pattern(2)), 1))
        os.kill(child.pid, signal.SIGKILL)
        assert parent.wait(child.pid) == -signal.SIGKILL
        assert press(arena) == 15
        assert parent.check("a", 1)


def test_a_grandchild_outlives_the_line_it_comes_from(start_peer):
    """Rule 10, twice."""
    parent = start_peer(spares=2)
    with small_arena() as arena:
        parent.load("a", dumps(arena.share(pattern(1)), 1))
        parent.view("a")
        child = parent.forked()
        grandchild = child.forked()
        assert taken_slots(arena.name) == [0, 1, 2, 3]
        os.kill(child.pid, signal.SIGKILL)
        parent.wait(child.pid)
        parent.end()
        assert press(arena) == 15
        assert grandchild.check("a", 1)
        assert grandchild.load("b", dumps(arena.share(pattern(2)), 1)) is None
        assert taken_slots(arena.name) == [0, 3]
        grandchild.drop("a")
        grandchild.drop("b")
        assert press(arena) == 16


def test_a_child_allocates_in_an_arena_of_its_own(start_peer, segments):
    """Rule 10: and a third process loads from both."""
    owner, consumer = start_peer(spares=1), start_peer()
    owner.share("a", 1)
    child = owner.forked()
    child.share("b", 2)
    owner.share("c", 3)
    assert child.arena() != owner.arena()
    for key, producer, seed in (("a", owner, 1), ("b", child, 2), ("c", owner, 3), ("a", child, 1)):
        assert consumer.load(key, producer.pickle(key, 1)) is None
        assert consumer.check(key, seed)
        consumer.drop(key)
    assert child.load("c", owner.pickle("c", 1)) is None
    assert child.check("c", 3)
    assert owner.load("b", child.pickle("b", 1)) is None
    assert owner.check("b", 2)


def test_a_child_cannot_allocate_or_revoke_in_its_parent_s_arena():
    """Rule 10: the arena object that it inherits says so."""
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = []
            for use in (lambda: arena.share(pattern(2)), handle.revoke, arena.trim):
                try:
                    use()
                except shmx.ReleasedError as error:
                    said.append("belongs to the parent" in str(error) or "only the process that owns" in str(error))
            said.append(is_pattern(handle.view(), 1))
            os.write(writer, bytes(said))
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as answers:
            assert answers.read() == b"\1\1\1\1"
        os.waitpid(pid, 0)
        assert is_pattern(handle.view(), 1)


def test_a_child_of_a_process_that_holds_nothing_takes_no_slot(start_peer):
    """Rule 10: a fork costs a slot only where there is something to inherit."""
    parent = start_peer(spares=1)
    with small_arena() as arena:
        parent.load("a", dumps(arena.share(pattern(1)), 1))
        parent.drop("a")
        child = parent.forked()
        assert taken_slots(arena.name) == [0, 1]
        assert child.attached() == []
        assert child.load("b", dumps(arena.share(pattern(2)), 1)) is None
        assert child.check("b", 2)
        assert taken_slots(arena.name) == [0, 1, 2]


def test_a_child_leaves_a_dead_producer_too(start_peer, segments):
    """Rule 7 for inherited memberships: a long-lived worker keeps no memory of producers that are gone."""
    first, second, parent = start_peer(), start_peer(), start_peer(spares=1)
    first.share("a", 1)
    parent.load("a", first.pickle("a", 1))
    parent.view("a")
    child = parent.forked()
    parent.drop("a")
    child.drop("a")
    first.drop("a")
    first.end()
    assert not segments()
    second.share("b", 2)
    assert child.load("b", second.pickle("b", 1)) is None
    assert child.attached() == [second.arena()]
    assert child.mapped() == [f"{second.arena()[1:]}.1"]


# ---- multiprocessing ----


def check_argument(connection, handle, seed):
    right = is_pattern(handle.view(), seed)
    connection.recv()
    return right and is_pattern(handle.view(), seed)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_handle_as_an_argument_of_a_process(children, method):
    """Rules 2 and 10: inherited by fork, pickled by spawn and forkserver; the sender lets go at once."""
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        child = children.start(check_argument, handle, 1, method=method)
        del handle
        assert press(arena) == 15
        child.send(None)
        assert child.result() is True
        assert press(arena) == 16


# ---- no free slot ----


def hold_one(connection, blob):
    handle = pickle.loads(blob)
    connection.send(handle.is_available)
    connection.recv()
    return is_pattern(handle.view(), 1)


def fill_slots(children, arena, spared):
    # Each child inherits this process's holds: it must have none.
    blob = dumps(arena.share(pattern(1)), CONSUMERS - spared)
    others = [children.start(hold_one, blob, method="fork") for _ in range(CONSUMERS - spared)]
    assert all(other.receive() for other in others)
    return others


def test_a_fork_without_a_free_slot_leaves_the_parent_right_and_the_child_informed(children, start_peer):
    """Rule 10."""
    parent = start_peer(spares=2)
    with small_arena() as arena:
        parent.load("a", dumps(arena.share(pattern(2)), 1))
        others = fill_slots(children, arena, spared=1)
        assert taken_slots(arena.name) == list(range(64))
        child = parent.forked()
        assert child.error("a") == "TooManyPeersError"
        assert parent.load("b", child.pickle("a", 1)) == "TooManyPeersError"
        assert parent.check("a", 2)
        assert press(arena) == 14
        assert parent.check("a", 2)

        others[0].send(None)
        assert others[0].result() is True
        assert child.load("a", dumps(arena.share(pattern(3)), 1)) is None
        assert child.check("a", 3)
        late = parent.forked()
        assert late.error("a") == "TooManyPeersError"
        for other in others[1:]:
            other.send(None)
            assert other.result() is True


def use_memory_after_release(connection, blob):
    """Fork without a free slot; the child lets go of what it could not inherit, and uses its own memory."""
    view = pickle.loads(blob).view()
    connection.send(None)
    connection.recv()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        # Where the kernel finds room: also where the parent's segment is mapped and here nothing is.
        own = [mmap.mmap(-1, BLOCK) for _ in range(4096)]
        for piece in own:
            piece[:8] = b"the heap"
        del view
        os._exit(0 if all(piece[:8] == b"the heap" for piece in own) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_without_a_slot_does_not_unmap_its_own_memory(children):
    """Rule 10: the parent's segments are absent there, and their addresses belong to somebody else."""
    with shmx.Arena(capacity=32 << 20, segment_bytes=32 << 20) as arena:
        forker = children.start(use_memory_after_release, dumps(arena.share(pattern(2)), 1), method="fork")
        forker.receive()
        others = fill_slots(children, arena, spared=1)
        forker.send(None)
        assert forker.result() == 0
        for other in others:
            other.send(None)
            other.result()


# ---- exec, raw clone ----


def slots_come_back(arena, expected):
    """Poll: the kernel drops the locks of the old program some moments after the new one has begun."""
    deadline = time.monotonic() + BOUND
    while taken_slots(arena.name) != expected and time.monotonic() < deadline:
        os.sched_yield()
    return taken_slots(arena.name) == expected


def test_exec_gives_the_slot_back(start_peer):
    """Rule 10: what a program inherits ends with it, though the process goes on."""
    parent = start_peer(spares=1)
    with small_arena() as arena:
        parent.load("a", dumps(arena.share(pattern(1)), 1))
        child = parent.forked()
        assert taken_slots(arena.name) == [0, 1, 2]
        child.tell("become_another_program")
        assert slots_come_back(arena, [0, 1])
        os.kill(child.pid, signal.SIGKILL)
        assert parent.wait(child.pid) == -signal.SIGKILL
        assert press(arena) == 15
        assert parent.check("a", 1)


def targets_of_descriptors(pid):
    targets = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        # What the loader of the new program has open while it begins may be closed by now.
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return targets


@pytest.mark.parametrize("preexec", [None, os.getpid])
def test_a_subprocess_costs_nothing(preexec):
    """Rule 10, for both ways in which subprocess makes its child (vfork, and fork with a preexec_fn)."""
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, preexec_fn=preexec) as process:
            assert slots_come_back(arena, [0])
            with open(f"/proc/{process.pid}/maps") as maps:
                assert "shmx-" not in maps.read()
            assert not [target for target in targets_of_descriptors(process.pid) if "shmx-" in target]
            process.stdin.close()
        assert is_pattern(handle.view(), 1)


def test_a_raw_clone_child_touches_nothing(start_peer, segments):
    """Rule 10: no at-fork handler has run in it, so neither its destructors nor its exit may change anything."""
    parent = start_peer(spares=1)
    parent.configure(capacity=16 * BLOCK, segment_bytes=16 * BLOCK)
    parent.share("own", 5)
    parent.view("own")
    with small_arena() as arena:
        parent.load("a", dumps(arena.share(pattern(1)), 1))
        parent.view("a")
        before = segments()
        clone = parent.forked("raw_clone")
        assert taken_slots(arena.name) == [0, 1]
        assert clone.error("a") == "ReleasedError"
        assert clone.load("b", dumps(arena.share(pattern(2)), 0)) == "ReleasedError"
        for key in ("a", "own"):
            clone.release(key)
            clone.drop(key)
        clone.leave_all()
        clone.end()
        assert parent.wait(clone.pid) == 0
        assert segments() == before
        assert press(arena) == 15
        assert parent.press() == 15
        assert parent.check("a", 1)
        assert parent.check("own", 5)


# ---- threads ----


def fork_while_threads_run(connection, blobs, forks):
    """Threads share, load and view without a pause while this thread forks; each child does the same once."""
    own = small_arena(blocks=64)
    stop = threading.Event()
    failures = []

    def work(index):
        seed = index
        with suppress(shmx.ArenaFullError):
            while not stop.is_set():
                seed += 7
                handle = own.share(pattern(seed, 4096))
                again = pickle.loads(dumps(handle, 1))
                view = again.view()
                del handle, again
                foreign = pickle.loads(blobs[index])
                if not (is_pattern(view, seed) and is_pattern(foreign.materialize(), index)):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(blobs))]
    for thread in threads:
        thread.start()
    try:
        for _ in range(forks):
            mine = own.share(pattern(99))
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                right = is_pattern(mine.view(), 99) and is_pattern(pickle.loads(blobs[0]).view(), 0)
                handle = shmx.share(pattern(98))
                right = right and is_pattern(pickle.loads(dumps(handle, 1)).view(), 98)
                del handle, mine
                shmx._core.leave_all()
                os.write(writer, b"\1" if right else b"\0")
                os._exit(0)
            os.close(writer)
            answered, _, _ = select.select([reader], [], [], BOUND / 2)
            answer = os.read(reader, 1) if answered else b"no answer: a deadlock"
            os.close(reader)
            if not answered:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if answer != b"\1":
                return answer
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        own.close()
    return failures


def test_forks_of_a_process_whose_threads_are_busy(children):
    """Rule 10: no lock is left taken in the child, and what it inherits is right."""
    with small_arena() as arena:
        blobs = [dumps(arena.share(pattern(seed)), 0) for seed in range(3)]
        held = [pickle.loads(blob) for blob in blobs]
        parent = children.start(fork_while_threads_run, blobs, 40, method="fork")
        assert parent.result() == []
        assert all(is_pattern(handle.view(), seed) for seed, handle in enumerate(held))


def fork_while_a_thread_makes_arenas(connection, forks):
    stop = threading.Event()

    def make():
        while not stop.is_set():
            with shmx.Arena(capacity=BLOCK):
                pass

    maker = threading.Thread(target=make)
    maker.start()
    inherited = set()
    for _ in range(forks):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            links = []
            for entry in os.listdir("/proc/self/fd"):
                with suppress(FileNotFoundError):
                    links.append(os.readlink(f"/proc/self/fd/{entry}"))
            os.write(writer, "\n".join(link for link in links if "shmx-" in link).encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as answer:
            inherited.update(answer.read().split("\n"))
        os.waitpid(pid, 0)
    stop.set()
    maker.join()
    return sorted(inherited - {""})


def test_a_fork_while_an_arena_is_made_inherits_no_descriptor(children):
    """Rules 7 and 10: through one, a child would keep a dead parent's owner lock, and memory whose name is gone."""
    forker = children.start(fork_while_a_thread_makes_arenas, 60, method="fork")
    assert forker.connection.poll(BOUND / 2), "a deadlock"
    assert forker.result() == []


# ---- resource_tracker ----

TRACKER = """
import multiprocessing.resource_tracker as tracker
import os, pickle, shmx
told = []
for name in ("register", "unregister", "ensure_running"):
    setattr(tracker, name, lambda *arguments, name=name: told.append((name, arguments)))
from tests.patterns import is_pattern, pattern
handle = shmx.share(pattern(1))
view = pickle.loads(pickle.dumps(handle)).view()
pid = os.fork()
if pid == 0:
    handle.release()
    shmx.share(pattern(2))
    os._exit(0 if is_pattern(view, 1) else 1)
status = os.waitpid(pid, 0)[1]
handle.release()
del view
shmx.trim()
shmx.gc(force=True)
print(status, told, tracker._resource_tracker._fd, tracker._resource_tracker._pid)
"""


def test_the_resource_tracker_is_neither_started_nor_told():
    """Rule 11."""
    ended = subprocess.run([sys.executable, "-c", TRACKER], capture_output=True, text=True, timeout=BOUND, check=False)
    assert (ended.stdout, ended.stderr) == ("0 [] None None\n", "")
