"""A /dev/shm of 16 MiB: whatever does not fit is a clean error at that moment, and never SIGBUS later (rule 9).

Each scenario runs in a process of its own with a small tmpfs of its own on /dev/shm.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.fault.own_shm import SHM, free_bytes, names, run_scenario

pytestmark = pytest.mark.needs_names

SHM_BYTES = 16 << 20
MIB = 1 << 20


# ---- scenarios: each runs alone, in a small /dev/shm ----


@contextmanager
def somebody_else_s_file(leaving: int) -> Iterator[None]:
    """Fill /dev/shm up to ``leaving`` bytes, and make room again."""
    path = SHM / "somebody-else"
    with path.open("wb") as file:
        size = 0
        while (excess := free_bytes() - leaving) > 0:
            try:
                os.posix_fallocate(file.fileno(), size, excess)
                size += excess
            except OSError as error:
                # An arena that grows ahead of need has been faster.
                if error.errno != errno.ENOSPC:
                    raise
    try:
        yield
    finally:
        path.unlink()


def expect_full(use: Callable[[], object]) -> None:
    import shmx

    try:
        use()
    except shmx.ArenaFullError as error:
        assert error.errno == errno.ENOSPC, error
        assert "/dev/shm is full" in str(error), error
        assert "shm-size" in str(error), error
        return
    raise AssertionError("there was room")


def share_is_refused_and_goes_on() -> None:
    import shmx
    from tests.patterns import is_pattern, pattern

    with shmx.Arena(capacity=1 << 30) as arena:
        held = [arena.share(pattern(seed, MIB)) for seed in range(8)]
        with somebody_else_s_file(leaving=MIB // 2):
            seed = len(held)
            while True:
                try:
                    held.append(arena.share(pattern(seed, MIB)))
                except shmx.ArenaFullError:
                    break
                seed += 1
            before = names()
            expect_full(lambda: arena.share(pattern(0, MIB)))
            expect_full(lambda: arena.share(pattern(0, 12 * MIB)))
            assert names() == before
            assert all(is_pattern(handle.view(), seed) for seed, handle in enumerate(held))
            held.pop().release()
            held.append(arena.share(pattern(seed - 1, MIB)))
        held.append(arena.share(pattern(seed, MIB)))
        assert all(is_pattern(handle.view(), seed) for seed, handle in enumerate(held))


def empty_is_refused_and_every_byte_of_what_was_given_can_be_written() -> None:
    import torch

    import shmx

    with shmx.Arena(capacity=1 << 30) as arena:
        given = []
        while True:
            try:
                given.append(arena.empty((MIB,), dtype=torch.uint8))
            except shmx.ArenaFullError:
                break
        assert 12 <= len(given) <= 16, len(given)
        expect_full(lambda: arena.empty((MIB,), dtype=torch.uint8))
        for value, tensor in enumerate(given):
            tensor.fill_(value)
        assert all(bool((tensor == value).all()) for value, tensor in enumerate(given))


def an_arena_is_refused_and_leaves_nothing() -> None:
    import shmx
    from tests.patterns import is_pattern, pattern

    for leaving in (0, 4096, 32 << 10):
        with somebody_else_s_file(leaving=leaving):
            before = names()
            expect_full(lambda: shmx.Arena(capacity=MIB))
            expect_full(lambda: shmx.share(pattern(1)))
            assert names() == before
    assert names() == []
    assert is_pattern(shmx.share(pattern(1)).view(), 1)
    shmx.default_arena().close()


def a_first_share_is_refused_and_leaves_no_data_segment() -> None:
    """Room for the control segment, none for data."""
    import shmx
    from tests.patterns import is_pattern, pattern

    with shmx.Arena(capacity=1 << 30) as arena:
        control = names()
        with somebody_else_s_file(leaving=0):
            for _ in range(3):
                expect_full(lambda: arena.share(pattern(1, MIB)))
            assert names() == sorted([*control, "somebody-else"])
        assert is_pattern(arena.share(pattern(2, MIB)).view(), 2)


def a_full_block_table_is_refused_and_goes_on() -> None:
    """Every step of the table is reserved, too: thousands of small tensors meet the end of /dev/shm there."""
    import shmx
    from tests.patterns import is_pattern, pattern

    with shmx.Arena(capacity=1 << 30) as arena:
        held = [arena.share(pattern(seed, 256)) for seed in range(200)]
        with somebody_else_s_file(leaving=0):
            while True:
                try:
                    held.append(arena.share(pattern(len(held), 256)))
                except shmx.ArenaFullError:
                    break
            assert len(held) < 10_000
            expect_full(lambda: arena.share(pattern(0, 256)))
            assert all(is_pattern(handle.view(), seed) for seed, handle in enumerate(held))
        held.append(arena.share(pattern(len(held), 256)))
        assert all(is_pattern(handle.view(), seed) for seed, handle in enumerate(held))


def a_dead_producer_s_memory_is_room_again() -> None:
    """Rule 7 meets rule 9: what a killed process has left is collected by the next arena that is made."""
    import signal

    import shmx
    from tests.patterns import is_pattern, pattern

    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            shmx.configure(capacity=1 << 30)
            shmx.share(pattern(0, 12 * MIB))
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert free_bytes() < 4 * MIB
        with shmx.Arena(capacity=1 << 30) as arena:
            assert is_pattern(arena.share(pattern(1, 12 * MIB)).view(), 1)
        del arena


def a_closed_arena_s_memory_is_room_again() -> None:
    """close() gives the memory back, not the collection of the object."""
    import shmx
    from tests.patterns import pattern

    before = free_bytes()
    arena = shmx.Arena(capacity=1 << 30)
    arena.share(pattern(0, 12 * MIB)).release()
    arena.close()
    assert names() == []
    assert free_bytes() == before


def views_of_a_peer_are_reserved_too() -> None:
    """A consumer maps pages that are there: reading and mapping them needs no room."""
    import pickle

    import shmx
    from tests.patterns import is_pattern, pattern

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        handles = pickle.loads(os.read(reader, 1 << 16))
        os._exit(0 if all(is_pattern(handle.view(), seed) for seed, handle in enumerate(handles)) else 1)
    with shmx.Arena(capacity=1 << 30) as arena:
        handles = [arena.share(pattern(seed, MIB)) for seed in range(4)]
        with somebody_else_s_file(leaving=0), shmx.readers(1):
            os.write(writer, pickle.dumps(handles))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def every_way_to_publish_16_mib_in_8_mib_is_refused() -> None:
    """One request that is larger than /dev/shm, on every path that takes memory, with room left and without."""
    import asyncio

    import torch

    import shmx
    from tests.patterns import is_pattern, pattern

    assert free_bytes() <= 8 * MIB
    large = pattern(0, 16 * MIB)
    strided = large.view(-1, 2).t()
    refused = 0
    # The first has a thread that grows it ahead of need.
    for settings in ({"capacity": 64 * MIB}, {"capacity": 32 * MIB}, {"capacity": 64 * MIB, "reserve": 48 * MIB}):
        with shmx.Arena(**settings) as arena:
            ways: list[Callable[[], object]] = [
                lambda arena=arena: arena.share(large),
                lambda arena=arena: arena.share(strided),
                lambda arena=arena: arena.share(large, key="content"),
                lambda arena=arena: arena.share(large, timeout=0.01),
                lambda arena=arena: arena.share_many([large[: MIB // 2], large]),
                lambda arena=arena: arena.share_many([large[: MIB // 8]] * 16),
                lambda arena=arena: arena.empty((16 * MIB,), dtype=torch.uint8),
                lambda arena=arena: asyncio.run(arena.share_async(large)),
                lambda arena=arena: asyncio.run(arena.share_async(large, timeout=0.01)),
            ]
            for held in (0, 4):
                kept = [arena.share(pattern(seed, MIB)) for seed in range(held)]
                for way in ways:
                    for _ in range(5):
                        expect_full(way)
                        refused += 1
                with somebody_else_s_file(leaving=0):
                    for way in ways:
                        expect_full(way)
                        refused += 1
                    assert all(is_pattern(handle.view(), seed) for seed, handle in enumerate(kept))
                for handle in kept:
                    handle.release()
            # What there is can be had, and written to its last byte.
            arena.trim()
            whole = arena.empty((4 * MIB,), dtype=torch.uint8)
            whole.fill_(7)
            assert bool((whole == 7).all())
            del whole, ways, way
    print(f"{refused} of {refused} requests were a clean ENOSPC")


def a_background_that_finds_no_room_harms_nothing() -> None:
    """reserve= of more than there is: what was reserved can be written, requests are served or refused."""
    import torch

    import shmx

    for leaving in (0, MIB, 5 * MIB):
        with shmx.Arena(capacity=1 << 30, reserve=1 << 30) as arena, somebody_else_s_file(leaving=leaving):
            given = []
            while True:
                try:
                    given.append(arena.empty((MIB // 4,), dtype=torch.uint8))
                except shmx.ArenaFullError:
                    break
            for value, tensor in enumerate(given):
                tensor.fill_(value % 251)
            assert all(bool((tensor == value % 251).all()) for value, tensor in enumerate(given))
            assert arena.stats()["reserved_bytes"] >= len(given) * (MIB // 4)
            del given


def a_consumer_attaches_maps_and_copies_without_room() -> None:
    """attach(), views, materialize and messages of its own touch shared pages that exist, and take none."""
    import pickle

    import shmx
    from tests.patterns import is_pattern, pattern

    reader, writer = os.pipe()
    answers, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        handles = pickle.loads(os.read(reader, 1 << 16))
        shmx.attach(handles[0])
        right = all(is_pattern(handle.view(), seed) for seed, handle in enumerate(handles))
        right = right and all(is_pattern(handle.materialize(), seed) for seed, handle in enumerate(handles))
        with shmx.readers(1):
            os.write(answer, pickle.dumps(handles))
        expect_full(lambda: shmx.share(pattern(0, MIB)))
        os._exit(0 if right else 1)
    with shmx.Arena(capacity=1 << 30) as arena:
        handles = [arena.share(pattern(seed, MIB)) for seed in range(4)]
        with somebody_else_s_file(leaving=0), shmx.readers(1):
            os.write(writer, pickle.dumps(handles))
            del handles
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            handles = pickle.loads(os.read(answers, 1 << 16))
            assert all(is_pattern(handle.view(), seed) for seed, handle in enumerate(handles))
        del handles


SCENARIOS = [
    share_is_refused_and_goes_on,
    empty_is_refused_and_every_byte_of_what_was_given_can_be_written,
    an_arena_is_refused_and_leaves_nothing,
    a_first_share_is_refused_and_leaves_no_data_segment,
    a_full_block_table_is_refused_and_goes_on,
    a_dead_producer_s_memory_is_room_again,
    a_closed_arena_s_memory_is_room_again,
    views_of_a_peer_are_reserved_too,
    a_background_that_finds_no_room_harms_nothing,
    a_consumer_attaches_maps_and_copies_without_room,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_in_16_mib(scenario):
    """Rule 9."""
    run_scenario(__name__, scenario.__name__, SHM_BYTES)


def test_a_request_of_twice_dev_shm_is_a_clean_error_on_every_path():
    """Rule 9: 8 MiB, and requests of 16."""
    print(run_scenario(__name__, every_way_to_publish_16_mib_in_8_mib_is_refused.__name__, 8 * MIB))


def test_the_small_shm_really_kills_who_does_not_reserve():
    """The danger is there: a mapping of a file that was sized and not reserved faults when /dev/shm is full."""
    with pytest.raises(AssertionError, match="signal 7"):
        run_scenario(__name__, touch_what_was_not_reserved.__name__, SHM_BYTES)


def touch_what_was_not_reserved() -> None:
    import mmap

    with (SHM / "lazy").open("w+b") as file:
        file.truncate(2 * SHM_BYTES)
        mapping = mmap.mmap(file.fileno(), 2 * SHM_BYTES)
        for offset in range(0, 2 * SHM_BYTES, 4096):
            mapping[offset] = 1


def main() -> None:
    scenario = globals()[sys.argv[1]]
    scenario()
    assert names() == [], names()
    print("held")


if __name__ == "__main__":
    main()
