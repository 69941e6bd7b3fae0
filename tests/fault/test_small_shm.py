"""A /dev/shm of 16 MiB: whatever does not fit is a clean error at that moment, and never SIGBUS later (rule 9).

Each scenario runs in a process of its own with a small tmpfs of its own on /dev/shm.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BOUND_S = 120
SHM_BYTES = 16 << 20
MIB = 1 << 20
SHM = Path("/dev/shm")


def in_small_shm(command: list[str]) -> subprocess.CompletedProcess[str]:
    mount = f'mount -t tmpfs -o size={SHM_BYTES} tmpfs /dev/shm && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", *command],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )


@functools.cache
def refusal() -> str | None:
    """Why there is no small /dev/shm to be had here."""
    if shutil.which("unshare") is None:
        return "unshare (util-linux) is not installed"
    tried = in_small_shm(["true"])
    return f"no mount namespace of one's own here: {tried.stderr.strip()}" if tried.returncode != 0 else None


@pytest.fixture
def run_scenario():
    if (reason := refusal()) is not None:
        pytest.skip(reason)

    def run(name: str) -> None:
        ended = in_small_shm([sys.executable, "-m", "tests.fault.test_small_shm", name])
        assert ended.returncode >= 0, f"ended by signal {-ended.returncode}"
        assert (ended.returncode, ended.stdout) == (0, "held\n"), ended.stderr

    return run


# ---- scenarios: each runs alone, in a small /dev/shm ----


def names() -> list[str]:
    return sorted(path.name for path in SHM.iterdir())


def free_bytes() -> int:
    facts = os.statvfs(SHM)
    return facts.f_bavail * facts.f_frsize


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


def expect_full(use) -> None:
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


SCENARIOS = [
    share_is_refused_and_goes_on,
    empty_is_refused_and_every_byte_of_what_was_given_can_be_written,
    an_arena_is_refused_and_leaves_nothing,
    a_first_share_is_refused_and_leaves_no_data_segment,
    a_full_block_table_is_refused_and_goes_on,
    a_dead_producer_s_memory_is_room_again,
    a_closed_arena_s_memory_is_room_again,
    views_of_a_peer_are_reserved_too,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_in_16_mib(run_scenario, scenario):
    """Rule 9."""
    run_scenario(scenario.__name__)


def test_the_small_shm_really_kills_who_does_not_reserve(run_scenario):
    """The danger is there: a mapping of a file that was sized and not reserved faults when /dev/shm is full."""
    with pytest.raises(AssertionError, match="signal 7"):
        run_scenario("touch_what_was_not_reserved")


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
