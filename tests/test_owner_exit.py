"""A producer that exits or dies: its messages are loaded all the same, and nothing of it is left (rules 2 and 7)."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import pickle
import random
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import shmx
from tests.patterns import BLOCK, is_pattern, pattern
from tests.peer import ENDS_AT_ONCE, ENDS_IN_ORDER, lock_slot
from tests.peer import start_peer_fixture as start_peer_fixture

SCRIPT_TIMEOUT_S = 120
RIGHT_EXIT_CODES = {"return": 0, "sys.exit": 0, "raise": 1, "os._exit": 0, "kill": -9}


def collect_until_gone(segments):
    deadline = time.monotonic() + 60
    while segments() and time.monotonic() < deadline:
        shmx.gc()
    return segments()


def outcomes(report):
    return {entry["name"]: entry["outcome"] for entry in report}


# ---- messages of a producer that is gone ----


@pytest.mark.parametrize("how", [*ENDS_IN_ORDER, *ENDS_AT_ONCE])
@pytest.mark.needs_names
def test_announced_loads_succeed_after_the_producer_s_end(start_peer, segments, how):
    """Rules 2 and 7; after an end in order, the last release removes everything without any reaper."""
    consumers = [start_peer() for _ in range(2)]
    producer = start_peer()
    producer.share("a", 1)
    producer.share("b", 2)
    blobs = producer.pickle("a", 2), producer.pickle("b", 2)
    producer.drop("b")
    assert producer.end(how) == RIGHT_EXIT_CODES[how]
    for consumer in consumers:
        for key, blob, seed in (("b", blobs[1], 2), ("a", blobs[0], 1)):
            assert segments()
            assert consumer.load(key, blob) is None
            assert consumer.check(key, seed)
    consumers[0].drop("a")
    consumers[0].drop("b")
    consumers[1].view("a")
    consumers[1].drop("b")
    assert consumers[1].check("a", 1)
    assert segments()
    consumers[1].drop("a")
    if how in ENDS_AT_ONCE:
        shmx.gc()
    assert not segments()


@pytest.mark.parametrize("how", ENDS_AT_ONCE)
@pytest.mark.needs_names
def test_the_next_arena_made_removes_what_a_dead_producer_left(start_peer, segments, how):
    """Rule 7: a producer that dies and starts again does not pile up memory."""
    producer = start_peer()
    producer.share("a", 1)
    producer.end(how)
    assert segments()
    with shmx.Arena(capacity=BLOCK) as arena:
        assert segments() == {arena.name[1:]}


def test_ending_in_order_without_messages_leaves_nothing(start_peer, segments):
    """Rule 7: held views of the producer itself do not keep its arena."""
    for how in ENDS_IN_ORDER:
        producer = start_peer()
        producer.share("a", 1)
        producer.view("a")
        producer.end(how)
        assert not segments()


@pytest.mark.needs_names
def test_a_message_hops_on_after_its_producer_s_end(start_peer, segments):
    """Rules 2 and 4: a holder of an orphan announces for processes that have never seen its arena."""
    producer, first = start_peer(), start_peer()
    producer.share("a", 1)
    blob = producer.pickle("a", 1)
    producer.end("kill")
    for _ in range(3):
        assert first.load("a", blob) is None
        blob = first.pickle("a", 1)
        first.end()
        assert segments()
        first = start_peer()
    assert first.load("a", blob) is None
    assert first.check("a", 1)
    first.drop("a")
    shmx.gc()
    assert not segments()


@pytest.mark.needs_names
def test_a_holder_s_bytes_stay_when_a_dead_producer_s_memory_is_collected(start_peer, segments):
    """Rules 1 and 7: gc(force=True) takes messages, never holds."""
    producer, holder, late = start_peer(), start_peer(), start_peer()
    producer.share("a", 1)
    blob = producer.pickle("a", 2)
    holder.load("a", blob)
    holder.view("a")
    name = producer.arena()
    producer.end("kill")
    for _ in range(2):
        assert outcomes(shmx.gc(force=True)) == {name: "in use"}
        assert holder.check("a", 1)
    assert late.load("a", blob) is None  # not announced any more, but held
    late.drop("a")
    holder.drop("a")
    shmx.gc()
    assert not segments()
    assert late.load("a", blob) == "SegmentLostError"


@pytest.mark.needs_names
def test_the_holder_of_an_orphan_is_killed(start_peer, segments):
    """Rules 6 and 7."""
    producer, holder = start_peer(), start_peer()
    producer.share("a", 1)
    holder.load("a", producer.pickle("a", 1))
    holder.view("a")
    producer.end("os._exit")
    assert set(outcomes(shmx.gc(force=True)).values()) == {"in use"}
    holder.kill()
    shmx.gc()
    assert not segments()


def test_messages_that_nobody_loads_go_after_their_time_to_live(start_peer, segments):
    """Rule 7."""
    producer = start_peer()
    producer.configure(ticket_ttl=0.05)
    producer.share("a", 1)
    producer.pickle("a", 3)
    producer.end()
    assert not collect_until_gone(segments)


@pytest.mark.needs_names
def test_messages_that_nobody_loads_go_at_once_by_force(start_peer, segments):
    """Rule 7; without force they wait for their time-to-live."""
    producer = start_peer()
    producer.share("a", 1)
    blob = producer.pickle("a", 3)
    name = producer.arena()
    producer.end()
    assert outcomes(shmx.gc()) == {name: "in use"}
    assert outcomes(shmx.gc(force=True)) == {name: "removed"}
    assert not segments()
    handle = pickle.loads(blob)
    assert type(handle.error) is shmx.SegmentLostError
    with pytest.raises(FileNotFoundError):
        handle.view()


@pytest.mark.needs_names
def test_discarding_the_last_message_of_an_orphan_removes_it(start_peer, segments):
    """Rule 7: a router that drops a request whose producer has ended."""
    producer = start_peer()
    producer.share("a", 1)
    blob = producer.pickle("a", 3)
    producer.end()
    assert segments()
    assert shmx.discard(blob) == 1
    assert not segments()


@pytest.mark.needs_names
def test_of_two_arenas_only_the_dead_one_goes(start_peer, segments):
    """Rule 7."""
    dead, alive, consumer = start_peer(), start_peer(), start_peer()
    for seed, producer in enumerate((dead, alive)):
        producer.share("a", seed)
    blob = alive.pickle("a", 1)
    names = dead.arena(), alive.arena()
    dead.end("kill")
    assert outcomes(shmx.gc(force=True)) == {names[0]: "removed", names[1]: "owner alive"}
    assert segments() == {names[1][1:], f"{names[1][1:]}.1"}
    assert consumer.load("a", blob) is None
    assert consumer.check("a", 1)


@pytest.mark.needs_names
def test_a_stopped_producer_is_not_dead(start_peer, segments):
    """Rule 7: SIGSTOP, or a debugger, must not cost a producer its arena."""
    producer, consumer = start_peer(), start_peer()
    producer.share("a", 1)
    blob = producer.pickle("a", 1)
    name = producer.arena()
    producer.stop()
    assert outcomes(shmx.gc(force=True)) == {name: "owner alive"}
    assert consumer.load("a", blob) is None
    assert consumer.check("a", 1)
    consumer.drop("a")
    producer.resume()
    assert producer.check("a", 1)


@pytest.mark.needs_names
def test_consumers_leave_a_dead_producer_when_another_one_comes(start_peer, segments):
    """Rule 7: a consumer that outlives many producers keeps no memory of theirs."""
    consumer = start_peer()
    for how in ("kill", "return", "os._exit", "return"):
        producer = start_peer()
        producer.share("a", 1)
        consumer.load("a", producer.pickle("a", 1))
        assert consumer.check("a", 1)
        assert consumer.attached() == [producer.arena()]
        assert len(consumer.mapped()) == 1
        consumer.drop("a")
        producer.end(how)
    consumer.gc()
    assert consumer.attached() == []
    assert consumer.mapped() == []


@pytest.mark.needs_names
def test_a_consumer_that_left_a_dead_producer_still_loads_its_messages(start_peer, segments):
    """Rules 2 and 7: leaving is not losing."""
    consumer, first, second = start_peer(), start_peer(), start_peer()
    first.share("a", 1)
    early, late = first.pickle("a", 1), first.pickle("a", 1)
    consumer.load("a", early)
    consumer.drop("a")
    first.end()
    second.share("a", 2)
    consumer.load("b", second.pickle("a", 1))
    assert consumer.attached() == [second.arena()]
    assert consumer.load("a", late) is None
    assert consumer.check("a", 1)
    consumer.drop("a")
    assert segments() == {second.arena()[1:], f"{second.arena()[1:]}.1"}


def test_a_live_consumer_s_backlog_outlives_the_time_to_live(start_peer):
    """Rule 2: the arena is an orphan, but a peer that may load the message lives; no memory pressure either."""
    producer, consumer = start_peer(), start_peer()
    producer.configure(ticket_ttl=0)
    producer.share("a", 1)
    producer.share("b", 2)
    blobs = [producer.pickle(key, 1) for key in "ab"]
    assert consumer.load("a", blobs[0]) is None
    producer.end()
    consumer.drop("a")
    assert consumer.load("b", blobs[1]) is None
    assert consumer.check("b", 2)


# ---- closing an arena ----


@pytest.mark.needs_names
def test_a_closed_arena_stays_until_its_messages_are_loaded(start_peer, segments):
    """Rules 2 and 7: close() is an exit of the arena, not of its messages."""
    consumer = start_peer()
    arena = shmx.Arena(capacity=BLOCK)
    handle = arena.share(pattern(1))
    with shmx.readers(2):
        blob = pickle.dumps(handle)
    arena.close()
    assert is_pattern(handle.view(), 1)
    del handle
    assert pickle.loads(blob).is_available
    assert consumer.load("a", blob) is None
    assert consumer.check("a", 1)
    assert segments()
    consumer.drop("a")
    assert not segments()
    with pytest.raises(shmx.ReleasedError):
        arena.share(torch.zeros(1))


def test_a_view_of_a_closed_arena_stays_readable(segments):
    """Rule 1."""
    arena = shmx.Arena(capacity=BLOCK)
    view = arena.share(pattern(1)).view()
    arena.close()
    shmx.gc(force=True)
    assert is_pattern(view, 1)
    del view
    assert not segments()


# ---- creation that was cut short ----


def torn_name():
    return f"shmx-{secrets.token_hex(8)}"


@pytest.mark.parametrize("nbytes", [0, 4096, 1 << 20])
def test_a_torn_creation_is_removed(segments, nbytes):
    """Rule 7: its creator was killed before the header was written."""
    name = torn_name()
    for suffix in ("", ".1"):
        with Path(f"/dev/shm/{name}{suffix}").open("wb") as file:
            file.truncate(nbytes)
    assert segments() == {name, f"{name}.1"}
    assert outcomes(shmx.gc()) == {f"/{name}": "removed"}
    assert not segments()


def test_a_creation_under_way_is_left_alone(segments):
    """Rule 7: whoever has the owner lock is about to write the header."""
    name = torn_name()
    with Path(f"/dev/shm/{name}").open("w+b") as file:
        file.truncate(1 << 20)
        lock_slot(file.fileno(), 0)
        assert outcomes(shmx.gc(force=True)) == {f"/{name}": "owner alive"}
        assert segments() == {name}
    shmx.gc()
    assert not segments()


def test_data_without_a_control_segment_goes_by_force(segments):
    """Rule 7: nobody can attach to it any more."""
    name = f"{torn_name()}.7"
    Path(f"/dev/shm/{name}").write_bytes(b"")
    shmx.gc()
    assert segments() == {name}
    shmx.gc(force=True)
    assert not segments()


def test_names_that_are_not_ours_are_never_removed():
    """Rule 7 ends at the prefix."""
    strangers = [Path(f"/dev/shm/{name}") for name in ("shmx-notes", "shmx-0123456789abcdeg", "psm_0123456789abcdef")]
    try:
        for stranger in strangers:
            stranger.write_bytes(b"")
        shmx.gc(force=True)
        assert all(stranger.exists() for stranger in strangers)
    finally:
        for stranger in strangers:
            stranger.unlink()


def make_arenas(connection):
    while True:
        connection.send(None)
        arena = shmx.Arena(capacity=2 * BLOCK, segment_bytes=BLOCK)
        handle = arena.share(torch.zeros(BLOCK // 4))
        with shmx.readers(1):
            pickle.dumps(handle)
        arena.share(torch.zeros(BLOCK // 4))
        arena.close()


def test_a_maker_of_arenas_killed_anywhere_leaves_nothing_that_gc_does_not_remove(children, segments):
    """Rule 7."""
    moment = random.Random(7)
    for _ in range(30):
        maker = children.start(make_arenas, method="fork")
        for _ in range(moment.randrange(1, 4)):
            maker.receive()
        # Not a synchronisation: it spreads the kills over the life of an arena.
        time.sleep(moment.random() * 2e-3)
        maker.kill()
    shmx.gc(force=True)
    assert not segments()


# ---- interpreters that end ----

SHARE_AND_END = """
import base64, json, os, pickle, threading
import shmx
from tests.patterns import pattern
handle = shmx.share(pattern(1))
with shmx.readers(1):
    blob = pickle.dumps(handle)
print(json.dumps(base64.b64encode(blob).decode()), flush=True)
"""


def run_script(text, *arguments):
    return subprocess.run(
        [sys.executable, "-c", text, *arguments], capture_output=True, text=True, timeout=SCRIPT_TIMEOUT_S, check=False
    )


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("raise ValueError", 1),
        ("threading.Thread(target=os.kill, args=(os.getpid(), 15)).start(); threading.Event().wait()", -15),
    ],
)
@pytest.mark.needs_names
def test_a_script_ends_right_after_it_has_sent(segments, ending, code):
    """Rules 2 and 7: the end of the main interpreter, without multiprocessing."""
    ended = run_script(SHARE_AND_END + ending)
    assert ended.returncode == code, ended.stderr
    handle = pickle.loads(base64.b64decode(json.loads(ended.stdout)))
    assert is_pattern(handle.view(), 1)
    del handle
    if code < 0:
        shmx.gc()
    assert not segments()


QUEUE_AND_END = """
import multiprocessing, sys
import shmx
from tests.patterns import is_pattern, pattern

def consume(queue, count):
    for seed in range(count):
        if not is_pattern(queue.get().view(), seed):
            sys.exit(3)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    consumer = context.Process(target=consume, args=(queue, 50))
    consumer.start()
    for seed in range(50):
        queue.put(shmx.share(pattern(seed)).with_readers(1))
    # Ends here: the queue's feeder thread still has to pickle, and the consumer is joined at exit.
    sys.stdout.write("sent")
"""


def test_a_script_ends_while_its_queue_still_pickles(segments):
    """Rule 2: a feeder thread pickles after put() has returned."""
    ended = run_script(QUEUE_AND_END)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "sent", "")
    assert not segments()


FORK_AND_END = """
import os, pickle, sys
import shmx
from tests.patterns import pattern
reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    handle = shmx.share(pattern(1))
    os.write(writer, handle.to_bytes())
    sys.exit(0)
blob = os.read(reader, 4096)
assert os.waitpid(pid, 0)[1] == 0
handle = shmx.SharedTensor.from_bytes(blob)
assert handle.is_available
handle.release()
print([name for name in os.listdir("/dev/shm") if "shmx-" in name])
"""


@pytest.mark.needs_names
def test_a_child_of_os_fork_leaves_its_own_arena_at_exit(segments):
    """Rule 7: an end in order needs no reaper, in a child that multiprocessing knows nothing of either."""
    ended = run_script(FORK_AND_END)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "[]\n"
    assert not segments()


_executors = []


def share_in_an_executor(_):
    executor = concurrent.futures.ThreadPoolExecutor(1)
    _executors.append(executor)  # as a module would keep it: nobody shuts it down
    with shmx.readers(1):
        return executor.submit(lambda: pickle.dumps(shmx.share(pattern(1)))).result()


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
@pytest.mark.needs_names
def test_a_child_with_an_idle_executor_ends_and_what_it_sent_is_kept(children, method, segments):
    """Rules 2 and 7: the threads of executors wait for work until the interpreter tells them to end."""
    handle = pickle.loads(children.start(share_in_an_executor, method=method).result())
    assert is_pattern(handle.view(), 1)
    del handle
    assert not segments()


WAITING_DAEMON = """
import sys, threading, torch, shmx
arena = shmx.Arena(capacity=8 << 20)
tensor = torch.ones(7 << 20, dtype=torch.uint8)
handle = arena.share(tensor)
def wait():
    arena.share(tensor, timeout=100)
thread = threading.Thread(target=wait, daemon=True)
thread.start()
while not any(frame.f_code is wait.__code__ for frame in sys._current_frames().values()):
    pass
"""


def test_a_daemon_thread_that_waits_for_room_does_not_disturb_the_exit(segments):
    """It comes back from the core while the interpreter ends, which takes no thread back."""
    done = run_script(WAITING_DAEMON)
    assert done.returncode == 0, done.stderr
    assert not segments()
