"""What an arena takes, where it ends, and what it does there: errors, waiting, growth, reuse, giving back."""

from __future__ import annotations

import copy
import errno
import gc
import math
import os
import pickle
import signal
import threading
from multiprocessing.connection import Connection

import pytest
import torch

import shmx
from shmx.config import ArenaConfig
from tests.blocks import block_of, generation_of, messages, names_of

MIB = 1 << 20


def filled(size: int, fill: int = 1) -> torch.Tensor:
    return torch.full((size,), fill, dtype=torch.uint8)


def fill_up(arena: shmx.Arena, size: int) -> list[shmx.SharedTensor]:
    """Share tensors of ``size`` bytes until the arena takes no more."""
    handles: list[shmx.SharedTensor] = []
    with pytest.raises(shmx.ArenaFullError):
        for _ in range(100_000):
            handles.append(arena.share(filled(size, len(handles) % 251)))
    return handles


# ---- settings


@pytest.fixture
def unconfigured(monkeypatch):
    """What a test tells shmx.configure ends with it."""
    monkeypatch.setattr(shmx.arena, "_configured", {})


def refused(kind: type[Exception], **setting: object) -> None:
    """Refused at once by whatever takes settings, by the setting's name."""
    for use in (shmx.Arena, shmx.configure):
        with pytest.raises(kind, match=rf"^{next(iter(setting))}=.*; give "):
            use(**setting)
    assert shmx.arena._configured == {}


SIZES = ["capacity", "segment_bytes", "reserve"]


@pytest.mark.usefixtures("unconfigured")
@pytest.mark.parametrize("field", SIZES)
def test_a_size_out_of_range_is_a_value_error_that_names_the_field(field, segments):
    for number in (0, -1, -(1 << 62), 1, 255, (1 << 46) + 1, 1 << 62, 1 << 63, 1 << 70, -(1 << 70), "1", "100TiB"):
        refused(ValueError, **{field: number})
    assert not segments()


@pytest.mark.usefixtures("unconfigured")
@pytest.mark.parametrize("field", SIZES)
def test_what_is_no_size_is_refused_by_name(field, segments):
    for wrong in (1.5, 1e9, [1 << 20], math.inf, b"1GiB"):
        refused(TypeError, **{field: wrong})
    refused(ValueError, **{field: "lots"})
    assert not segments()


@pytest.mark.usefixtures("unconfigured")
@pytest.mark.parametrize("field", ["ticket_ttl", "reuse_delay"])
def test_a_time_that_is_negative_or_no_number_is_refused_by_name(field):
    for wrong in (-1, -0.001, -math.inf, math.nan):
        refused(ValueError, **{field: wrong})
    for wrong in ("soon", "5", [5]):
        refused(TypeError, **{field: wrong})
    for right in (0, 0.5, 10**9, math.inf):
        shmx.Arena(**{field: right}).close()


@pytest.mark.usefixtures("unconfigured")
def test_every_other_setting_that_is_none_is_refused_by_name():
    for wrong in ("foo", "", 5):
        refused(ValueError, backend=wrong)
    for wrong in (1, "yes"):
        refused(TypeError, scrub=wrong)
    refused(ValueError, numa_node=-1)
    refused(TypeError, numa_node="0")
    refused(TypeError, group=1.5)


@pytest.mark.usefixtures("unconfigured")
def test_an_argument_may_be_a_size_with_a_unit():
    assert shmx.Arena(capacity="2MiB").capacity == 2 * MIB
    shmx.configure(capacity="3MiB", segment_bytes="8KiB")
    assert shmx.default_arena().capacity == 3 * MIB


def test_an_unknown_setting_is_a_type_error():
    for refuse in (shmx.Arena, shmx.configure):
        with pytest.raises(TypeError, match="size"):
            refuse(size=MIB)


@pytest.mark.needs_names
def test_capacity_is_rounded_down_to_pages_and_the_default_is_half_of_dev_shm_at_most():
    page = os.sysconf("SC_PAGESIZE")
    assert shmx.Arena(capacity=10 * page + 17).capacity == 10 * page
    facts = os.statvfs("/dev/shm")
    half = facts.f_blocks * facts.f_frsize // 2
    assert shmx.Arena().capacity == min(half // page * page, 64 << 30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("64MiB", 64 * MIB),
        ("64mb", 64 * MIB),
        ("64m", 64 * MIB),
        (" 1.5 GiB ", 3 << 29),
        ("8K", 8192),
        ("1t", 1 << 40),
    ],
)
def test_a_size_in_the_environment_may_have_a_unit(text, expected, monkeypatch):
    monkeypatch.delenv("SHMX_BACKEND", raising=False)
    monkeypatch.setenv("SHMX_CAPACITY", text)
    monkeypatch.setenv("SHMX_SEGMENT_BYTES", text)
    assert ArenaConfig.from_environment() == ArenaConfig(capacity=expected, segment_bytes=expected)


@pytest.mark.parametrize(("text", "expected"), [("1", True), ("yes", True), ("ON", True), ("0", False), ("", False)])
def test_a_flag_in_the_environment(text, expected, monkeypatch):
    monkeypatch.delenv("SHMX_BACKEND", raising=False)
    monkeypatch.setenv("SHMX_SCRUB", text)
    assert ArenaConfig.from_environment() == ArenaConfig(scrub=expected)


UNREADABLE = {
    "SHMX_CAPACITY": ["lots", "", "12 parsecs", "1e5", "0x10", "GiB", "nan"],
    "SHMX_SEGMENT_BYTES": ["-", "1,5GiB"],
    "SHMX_TICKET_TTL": ["soon", "", "5min"],
    "SHMX_REUSE_DELAY": ["0,1"],
    "SHMX_SCRUB": ["maybe", "2"],
}
OUT_OF_RANGE = {
    "SHMX_CAPACITY": ["0", "-5", "1", "100TiB", str(1 << 70), "9" * 400 + ".0"],
    "SHMX_SEGMENT_BYTES": ["0", "-1", "100TiB"],
    "SHMX_TICKET_TTL": ["-1", "nan"],
    "SHMX_REUSE_DELAY": ["-1"],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_environment_variable_that_cannot_be_read_is_a_value_error_that_names_it(name, monkeypatch):
    for text in UNREADABLE[name]:
        monkeypatch.setenv(name, text)
        for use in (shmx.Arena, lambda: shmx.share(torch.zeros(3))):
            with pytest.raises(ValueError) as caught:
                use()
            assert f"{name}={text!r}" in str(caught.value)


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_an_environment_variable_out_of_range_is_a_value_error_that_names_it(name, monkeypatch):
    for text in OUT_OF_RANGE[name]:
        monkeypatch.setenv(name, text)
        with pytest.raises(ValueError, match=name):
            shmx.Arena()


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("SHMX_CAPACITY", "1MiB")
    assert shmx.Arena().capacity == MIB
    assert shmx.Arena(capacity=2 * MIB).capacity == 2 * MIB


@pytest.mark.usefixtures("unconfigured")
def test_configure_sets_what_the_default_arena_is_made_with(monkeypatch):
    monkeypatch.setenv("SHMX_CAPACITY", "1MiB")
    monkeypatch.setenv("SHMX_SEGMENT_BYTES", "8KiB")
    shmx.configure(capacity=3 * MIB)
    shmx.configure(scrub=True)
    arena = shmx.default_arena()
    assert arena.capacity == 3 * MIB
    handles = [shmx.share(filled(8192)) for _ in range(2)]
    assert arena.stats()["segments"] == len(handles)


@pytest.mark.usefixtures("unconfigured")
def test_configure_after_the_default_arena_exists_is_a_runtime_error_that_names_it():
    arena = shmx.default_arena()
    with pytest.raises(RuntimeError, match=f"{arena.name} exists already; call shmx.configure before"):
        shmx.configure(capacity=MIB)
    arena.close()
    shmx.configure(capacity=MIB)
    assert shmx.default_arena().capacity == MIB


# ---- a full arena


def test_a_full_arena_is_an_enospc_that_says_who_holds_what_and_the_remedy():
    arena = shmx.Arena(capacity=4 * MIB)
    handles = fill_up(arena, MIB)
    sent = pickle.dumps(handles[0])
    handles[0].release()
    with pytest.raises(shmx.ArenaFullError) as caught:
        arena.share(filled(MIB))
    error = caught.value
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    for told in (
        arena.name,
        "no room for 1.0 MiB",
        "capacity of 4.0 MiB is used up",
        "held by this process 3.0 MiB",
        "1 messages not loaded yet 1.0 MiB",
        "SHMX_CAPACITY",
        "timeout=",
    ):
        assert told in str(error)
    assert shmx.discard(sent) == 1
    arena.share(filled(MIB))


def hold(connection: Connection) -> None:
    handle = connection.recv()
    connection.send(os.getpid())
    assert connection.recv() == "release"
    handle.release()


def test_a_full_arena_names_the_process_that_holds_it(children):
    arena = shmx.Arena(capacity=2 * MIB)
    handle = arena.share(filled(2 * MIB))
    child = children.start(hold)
    child.send(handle)
    pid = child.receive()
    handle.release()
    with pytest.raises(shmx.ArenaFullError, match=rf"by its consumers 2.0 MiB \(pid {pid}: 2.0 MiB\)"):
        arena.share(filled(MIB))
    child.send("release")
    # The room comes back while the call waits for it.
    arena.share(filled(2 * MIB), timeout=100)
    child.result()


def test_a_full_arena_tells_what_is_held_by_several_processes_once(children):
    arena = shmx.Arena(capacity=3 * MIB)
    shared, _alone = arena.share(filled(2 * MIB)), arena.share(filled(MIB))
    consumers = [children.start(hold), children.start(hold)]
    pids = []
    for child in consumers:
        child.send(shared)
        pids.append(child.receive())
    with pytest.raises(shmx.ArenaFullError) as caught:
        arena.share(filled(MIB))
    told = f"by its consumers 2.0 MiB together, some of it by several (pid {pids[0]}: 2.0 MiB, pid {pids[1]}: 2.0 MiB)"
    assert told in str(caught.value)
    for child in consumers:
        child.send("release")
        child.result()


@pytest.mark.needs_names
def test_a_capacity_that_nobody_chose_is_told_to_be_half_of_dev_shm():
    origin = "it is half of /dev/shm, which docker run --shm-size enlarges"
    for arena, told in ((shmx.Arena(), True), (shmx.Arena(capacity=shmx.default_arena().capacity), False)):
        with pytest.raises(shmx.ArenaFullError) as caught:
            arena.empty((arena.capacity + 1,), dtype=torch.uint8)
        assert (origin in str(caught.value)) == (told and arena.capacity < 64 << 30)


def test_a_tensor_larger_than_the_capacity_is_refused_at_once():
    arena = shmx.Arena(capacity=MIB)
    for refuse in (
        lambda: arena.share(filled(MIB + 1), timeout=10_000),
        lambda: arena.empty((1 << 40,), dtype=torch.float64, timeout=math.inf),
        lambda: arena.empty((1 << 62, 1 << 62), dtype=torch.float64, timeout=math.inf),
    ):
        with pytest.raises(shmx.ArenaFullError) as caught:
            refuse()
        assert caught.value.errno == errno.ENOSPC
    with pytest.raises(shmx.ArenaFullError, match=r"capacity is 1\.0 MiB; raise it \(SHMX_CAPACITY"):
        arena.share(filled(MIB + 1))
    assert arena.stats()["reserved_bytes"] == 0


@pytest.mark.parametrize("capacity", [4096, MIB, MIB + 4096, 3 * MIB])
def test_a_tensor_as_large_as_the_capacity_fits(capacity):
    arena = shmx.Arena(capacity=capacity)
    for fill in range(3):
        assert torch.equal(arena.share(filled(capacity, fill)).view(), filled(capacity, fill))


@pytest.mark.needs_names
def test_more_than_dev_shm_holds_is_refused_cleanly_and_the_arena_goes_on():
    """Rule 9."""
    facts = os.statvfs("/dev/shm")
    arena = shmx.Arena(capacity=1 << 46)
    with pytest.raises(shmx.ArenaFullError) as caught:
        arena.empty((facts.f_blocks * facts.f_frsize + MIB,), dtype=torch.uint8)
    assert caught.value.errno == errno.ENOSPC
    assert "--shm-size" in str(caught.value) or "container's memory limit" in str(caught.value)
    assert str(caught.value).count("no room for") == 1
    assert "SHMX_CAPACITY" not in str(caught.value) or "memory limit" in str(caught.value)
    assert arena.stats()["reserved_bytes"] == 0
    assert names_of(arena) == {arena.name.removeprefix("/")}
    assert torch.equal(arena.share(filled(MIB)).view(), filled(MIB))


def test_a_failed_share_leaves_the_arena_as_it_was():
    arena = shmx.Arena(capacity=2 * MIB)
    handles = fill_up(arena, MIB)
    before = arena.stats()
    for _ in range(3):
        with pytest.raises(shmx.ArenaFullError):
            arena.share(filled(MIB))
        with pytest.raises(shmx.ArenaFullError):
            arena.share(filled(MIB).reshape(-1, 2).t())
    assert arena.stats() == before
    assert [handle.view()[0].item() for handle in handles] == [0, 1]


# ---- waiting for room


def test_timeout_waits_for_room_that_another_thread_makes():
    arena = shmx.Arena(capacity=MIB)
    handle = arena.share(filled(MIB, 1))
    about_to_wait = threading.Event()
    results: list[shmx.SharedTensor] = []

    def share() -> None:
        with pytest.raises(shmx.ArenaFullError):
            arena.share(filled(MIB, 2))
        about_to_wait.set()
        results.append(arena.share(filled(MIB, 2), timeout=100))

    thread = threading.Thread(target=share)
    thread.start()
    assert about_to_wait.wait(100)
    handle.release()
    thread.join()
    assert torch.equal(results[0].view(), filled(MIB, 2))
    assert block_of(results[0]) == block_of(handle)


@pytest.mark.parametrize("timeout", [0, 0.05, -1])
def test_timeout_raises_when_no_room_comes(timeout):
    arena = shmx.Arena(capacity=MIB)
    handle = arena.share(filled(MIB))
    with pytest.raises(shmx.ArenaFullError, match="used up"):
        arena.share(filled(MIB), timeout=timeout)
    with pytest.raises(shmx.ArenaFullError, match="used up"):
        arena.empty((MIB,), dtype=torch.uint8, timeout=timeout)
    assert handle.is_available


def test_a_signal_ends_the_wait_for_room():
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    arena = shmx.Arena(capacity=MIB)
    handle = arena.share(filled(MIB))
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interrupted):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            arena.share(filled(MIB), timeout=10_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    handle.release()
    arena.share(filled(MIB))


# ---- growth and reuse


@pytest.mark.needs_names
def test_an_arena_grows_up_to_its_capacity_and_not_beyond():
    arena = shmx.Arena(capacity=8 * MIB, segment_bytes=2 * MIB)
    assert arena.stats()["reserved_bytes"] == 0
    handles = []
    for count in range(1, 9):
        handles.append(arena.share(filled(MIB, count)))
        assert count * MIB <= arena.stats()["reserved_bytes"] <= 8 * MIB
    with pytest.raises(shmx.ArenaFullError):
        arena.share(filled(256))
    stats = arena.stats()
    assert (stats["reserved_bytes"], stats["segments"], stats["bytes_in_use"]) == (8 * MIB, 4, 8 * MIB)
    on_disk = sum(os.stat(f"/dev/shm/{name}").st_blocks * 512 for name in names_of(arena) if "." in name)
    assert on_disk == 8 * MIB
    for count, handle in enumerate(handles, start=1):
        assert torch.equal(handle.view(), filled(MIB, count))


def test_only_what_is_used_is_reserved():
    arena = shmx.Arena(capacity=1 << 36, segment_bytes=1 << 32)
    handle = arena.share(filled(MIB))
    assert arena.stats()["reserved_bytes"] <= 4 * MIB
    assert handle.is_available


def test_a_tensor_larger_than_a_segment_gets_its_own_and_its_room_serves_smaller_ones_later():
    arena = shmx.Arena(capacity=16 * MIB, segment_bytes=MIB)
    small = arena.share(filled(MIB))
    large = arena.share(filled(10 * MIB, 3))
    assert torch.equal(large.view(), filled(10 * MIB, 3))
    assert arena.stats()["segments"] == 2
    reserved = arena.stats()["reserved_bytes"]
    large.release()
    later = [arena.share(filled(MIB, fill)) for fill in range(10)]
    assert arena.stats()["reserved_bytes"] == reserved
    assert arena.stats()["segments"] == 2
    assert all(torch.equal(handle.view(), filled(MIB, fill)) for fill, handle in enumerate(later))
    assert small.is_available


def test_many_small_blocks_that_are_free_serve_one_large_tensor():
    arena = shmx.Arena(capacity=4 * MIB)
    handles = [arena.share(filled(64 << 10)) for _ in range(64)]
    # In an order that leaves holes everywhere until the end.
    for handle in handles[::2] + handles[1::2]:
        handle.release()
    assert torch.equal(arena.share(filled(4 * MIB, 5)).view(), filled(4 * MIB, 5))
    assert arena.stats()["segments"] == 1


def test_rooms_of_whole_segments_are_exchanged_for_one_that_is_larger():
    arena = shmx.Arena(capacity=4 * MIB, segment_bytes=MIB)
    for handle in fill_up(arena, MIB):
        handle.release()
    assert arena.stats()["segments"] == 4
    assert torch.equal(arena.share(filled(4 * MIB, 5)).view(), filled(4 * MIB, 5))
    assert arena.stats()["reserved_bytes"] == 4 * MIB


def test_a_released_block_is_used_again_with_another_generation():
    arena = shmx.Arena(capacity=16 * MIB)
    seen = []
    for fill in range(5):
        with arena.share(filled(MIB, fill)) as handle:
            seen.append((block_of(handle), generation_of(handle)))
            assert torch.equal(handle.view(), filled(MIB, fill))
    assert len({block for block, _ in seen}) == 1
    assert [generation for _, generation in seen] == [0, 2, 4, 6, 8]
    stats = arena.stats()
    assert (stats["published"], stats["reused"]) == (5, 4)


def test_a_block_that_was_announced_by_default_rests_before_it_is_used_again():
    arena = shmx.Arena(capacity=16 * MIB, reuse_delay=1000)
    handle = arena.share(filled(MIB, 1))
    blob = pickle.dumps(handle)
    pickle.loads(blob).release()
    block = block_of(handle)
    handle.release()
    other = arena.share(filled(MIB, 2))
    assert block_of(other) != block
    # A second, unannounced load still finds it.
    assert torch.equal(pickle.loads(blob).view(), filled(MIB, 1))
    # Under pressure it does not rest.
    gc.collect()
    assert block in [block_of(handle) for handle in fill_up(arena, MIB)]


def test_a_block_whose_loads_were_all_announced_is_used_again_at_once():
    arena = shmx.Arena(capacity=16 * MIB, reuse_delay=1000)
    handle = arena.share(filled(MIB, 1))
    with shmx.readers(1):
        blob = pickle.dumps(handle)
    handle.release()
    other = arena.share(filled(MIB, 2))
    assert block_of(other) != block_of(handle)  # the load is still to come
    pickle.loads(blob).release()
    assert block_of(arena.share(filled(MIB, 3))) == block_of(handle)
    with pytest.raises(shmx.StaleHandleError):
        pickle.loads(blob).view()


def test_scrub_clears_a_block_before_its_bytes_can_be_seen_again():
    def left_behind(arena: shmx.Arena) -> torch.Tensor:
        arena.share(filled(MIB, 7)).release()
        again = arena.empty((MIB,), dtype=torch.uint8).clone()
        arena.share(filled(MIB, 7)).release()
        smaller = arena.empty((MIB // 3,), dtype=torch.uint8).clone()
        return torch.cat([again, smaller])

    assert torch.all(left_behind(shmx.Arena(capacity=MIB)) == 7)
    assert torch.all(left_behind(shmx.Arena(capacity=MIB, scrub=True)) == 0)


def test_any_number_of_small_tensors_reserves_what_they_need():
    arena = shmx.default_arena()
    one = torch.zeros(3)
    handles = []
    for _ in range(2000):
        handles.append(arena.share(one))
        assert arena.stats()["reserved_bytes"] <= 4 * MIB
    assert len({block_of(handle) for handle in handles}) == 2000


def test_no_more_than_131072_blocks_and_released_ones_are_used_again():
    arena = shmx.Arena(capacity=64 * MIB)
    one = filled(1)
    handles = [arena.share(one) for _ in range(1 << 17)]
    with pytest.raises(shmx.ArenaFullError, match="all 131072 blocks are in use"):
        arena.share(one)
    handles.pop().release()
    assert arena.share(one).is_available


def test_idle_blocks_of_another_size_make_room_in_a_full_table():
    arena = shmx.Arena(capacity=64 * MIB)
    one = filled(1)
    for handle in [arena.share(one) for _ in range(1 << 17)]:
        handle.release()
    assert arena.stats()["held_blocks"] == 0
    assert arena.share(filled(1000)).is_available


@pytest.mark.needs_names
def test_no_more_than_1024_segments_and_trim_makes_room_for_others():
    arena = shmx.Arena(capacity=16 * MIB, segment_bytes=4096)
    page = filled(4096)
    handles = [arena.share(page) for _ in range(1024)]
    with pytest.raises(shmx.ArenaFullError, match=r"all 1024 segments are in use; raise segment_bytes \(SHMX_"):
        arena.share(page)
    for handle in handles[::2]:
        handle.release()
    assert arena.trim() == 512 * 4096
    assert arena.share(page).is_available
    assert len(names_of(arena)) == 1 + 513


# ---- giving back


@pytest.mark.needs_names
def test_trim_returns_names_and_bytes_and_the_arena_goes_on():
    arena = shmx.Arena(capacity=16 * MIB, segment_bytes=4 * MIB)
    handles = [arena.share(filled(4 * MIB, fill)) for fill in range(3)]
    assert len(names_of(arena)) == 4
    assert arena.trim() == 0
    handles[0].release()
    handles[2].release()
    assert arena.trim() == 8 * MIB
    assert len(names_of(arena)) == 2
    assert arena.stats()["reserved_bytes"] == 4 * MIB
    assert torch.equal(handles[1].view(), filled(4 * MIB, 1))
    assert arena.trim() == 0
    # Segment ids are not used twice.
    old = names_of(arena)
    again = arena.share(filled(4 * MIB, 9))
    assert torch.equal(again.view(), filled(4 * MIB, 9))
    assert names_of(arena) - old == {arena.name.removeprefix("/") + ".4"}


def test_trim_leaves_what_is_announced_or_viewed():
    arena = shmx.Arena(capacity=16 * MIB, segment_bytes=4 * MIB)
    announced, viewed = (arena.share(filled(4 * MIB, fill)) for fill in (1, 2))
    blob, view = pickle.dumps(announced), viewed.view()
    announced.release()
    viewed.release()
    assert arena.trim() == 0
    assert torch.equal(pickle.loads(blob).view(), filled(4 * MIB, 1))
    assert torch.equal(view, filled(4 * MIB, 2))
    del view
    gc.collect()
    assert arena.trim() == 8 * MIB


def test_trim_of_the_package_is_that_of_the_default_arena():
    assert shmx.trim() == 0  # no arena is made for it
    assert shmx.stats()["arena"] is None
    shmx.share(filled(MIB)).release()
    assert shmx.trim() >= MIB
    assert shmx.stats()["arena"]["reserved_bytes"] == 0


def loads_before_and_after_trim(connection: Connection) -> None:
    first = connection.recv()
    connection.send(int(first.view().sum()))
    first.release()
    second = connection.recv()
    connection.send(int(second.view().sum()))
    with open("/proc/self/maps") as maps:
        connection.send("(deleted)" in "".join(line for line in maps if "/dev/shm/shmx-" in line))


def test_a_consumer_unmaps_what_was_trimmed_at_its_next_load(children):
    arena = shmx.Arena(capacity=16 * MIB)
    handle = arena.share(filled(MIB, 2))
    child = children.start(loads_before_and_after_trim)
    child.send(handle)
    assert child.receive() == 2 * MIB
    handle.release()
    while arena.trim() == 0:  # the child releases at its own pace
        pass
    child.send(arena.share(filled(MIB, 3)))
    assert child.receive() == 3 * MIB
    assert child.receive() is False
    child.result()


# ---- the end


def test_a_closed_arena_raises_released_and_names_itself():
    arena = shmx.Arena(capacity=MIB)
    arena.share(filled(10)).release()
    assert not arena.closed
    arena.close()
    arena.close()
    assert arena.closed
    assert repr(arena) == f"Arena({arena.name}, closed)"
    for use in (
        lambda: arena.share(filled(10)),
        lambda: arena.share(filled(10), key="a"),
        lambda: arena.empty((3,), dtype=torch.uint8),
        arena.trim,
        arena.sweep,
    ):
        with pytest.raises(shmx.ReleasedError, match=f"{arena.name} is closed; make another one"):
            use()
    assert not names_of(arena)


def test_leaving_the_with_block_of_an_arena_closes_it():
    with shmx.Arena(capacity=MIB) as arena:
        assert arena.share(filled(10)).is_available
        assert repr(arena) == f"Arena({arena.name}, capacity={MIB})"
    assert arena.closed


def test_a_closed_default_arena_is_followed_by_another():
    first = shmx.default_arena()
    first.close()
    second = shmx.default_arena()
    assert second.name != first.name
    assert shmx.share(filled(3)).is_available


@pytest.mark.needs_names
def test_close_with_a_live_view_keeps_the_data_and_the_names_go_with_the_last_view():
    arena = shmx.Arena(capacity=MIB)
    handle = arena.share(filled(1000, 7))
    view, alias = handle.view(), handle.view()[10:]
    handle.release()
    arena.close()
    assert len(names_of(arena)) == 2
    assert torch.equal(view, filled(1000, 7))
    del view
    gc.collect()
    assert len(names_of(arena)) == 2
    assert torch.equal(alias, filled(990, 7))
    del alias
    gc.collect()
    assert not names_of(arena)


@pytest.mark.needs_names
def test_an_arena_that_is_collected_leaves_when_its_last_handle_does():
    arena = shmx.Arena(capacity=MIB)
    prefix = arena.name.removeprefix("/")
    handle = arena.share(filled(1000, 7))
    del arena
    gc.collect()
    assert torch.equal(handle.view(), filled(1000, 7))
    assert any(name.startswith(prefix) for name in os.listdir("/dev/shm"))
    del handle
    gc.collect()
    assert not any(name.startswith(prefix) for name in os.listdir("/dev/shm"))


@pytest.mark.needs_names
def test_close_with_a_message_on_its_way_leaves_the_arena_until_it_is_loaded():
    arena = shmx.Arena(capacity=MIB)
    with arena.share(filled(1000, 7)) as handle:
        blob = pickle.dumps(handle)
    arena.close()
    assert len(names_of(arena)) == 2
    loaded = pickle.loads(blob)
    assert torch.equal(loaded.view(), filled(1000, 7))
    del loaded
    gc.collect()
    assert not names_of(arena)


def test_a_second_release_does_nothing():
    """Rule 8."""
    arena = shmx.Arena(capacity=MIB)
    handle = arena.share(filled(10))
    twin = copy.copy(handle)
    for _ in range(3):
        handle.release()
    assert arena.stats()["held_blocks"] == 1
    assert torch.equal(twin.view(), filled(10))
    twin.release()
    assert arena.stats()["held_blocks"] == 0
    handle.release()
    assert messages(arena) == 0


def test_use_after_release_raises_released():
    handle = shmx.share(filled(10))
    handle.release()
    for use in (
        handle.view,
        handle.materialize,
        handle.numpy,
        handle.__dlpack__,
        lambda: handle.materialize("cpu"),
        lambda: handle.materialize_into(filled(10)),
        lambda: handle.__array__(),
    ):
        with pytest.raises(shmx.ReleasedError, match="was released; take views and copies before"):
            use()
    handle.revoke()  # nothing is left to revoke
