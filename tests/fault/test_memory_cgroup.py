"""A memory cgroup near its limit: growth is refused with an error, before the kernel would kill."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.own_shm import BOUND_S

MIB = 1 << 20
ROOT = Path("/sys/fs/cgroup")
# An interpreter with torch takes some 200 MiB, or up to 400 with the pages of its libraries.
LIMIT = 768 * MIB


def own_groups() -> Iterator[tuple[Path, str]]:
    """Directories of this process's memory cgroup, version 2 or 1, with the name of the file that limits it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield ROOT / path.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            yield ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A memory cgroup of LIMIT bytes below this process's own."""
    why = "this process is in no memory cgroup"
    for directory, limit_file in own_groups():
        group = directory / f"shmx-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            why = str(error)
            continue
        try:
            (group / limit_file).write_text(str(LIMIT))
            yield group
            return
        except OSError as error:
            why = str(error)
        finally:
            group.rmdir()
    pytest.skip(f"no memory cgroup can be made here: {why}")


def run(scenario: str, *prefix: str) -> str:
    ended = subprocess.run(
        [*prefix, sys.executable, "-m", __name__, scenario],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.returncode}: {ended.stderr}"
    return ended.stdout


def test_growth_is_refused_where_the_group_has_no_room_left(limited_group):
    """Rule 9: all that was given can be written; nobody is killed."""
    # The group is joined before the program starts, as in a container.
    print(run("fill", "sh", "-c", f'echo $$ > {limited_group}/cgroup.procs && exec "$@"', "sh"))


def test_growth_follows_the_figures_of_the_group():
    """Files of ours in the place of the kernel's: limit, use, and page cache that the kernel would drop first."""
    from tests.fault.own_shm import refusal

    if (reason := refusal()) is not None:
        pytest.skip(reason)
    mounts = f"mount -t tmpfs tmpfs {ROOT} && mount -t tmpfs -o size=256m tmpfs /dev/shm"
    run("follow", "unshare", "--mount", "--map-root-user", "sh", "-c", f'{mounts} && exec "$@"', "sh")


# ---- scenarios


def fill() -> None:
    import torch

    import shmx

    with shmx.Arena(capacity=4 * LIMIT) as arena:
        given = []
        while len(given) * 16 * MIB < LIMIT:
            try:
                given.append(arena.empty((16 * MIB,), dtype=torch.uint8))
            except shmx.ArenaFullError as error:
                assert error.errno == errno.ENOSPC, error
                assert "memory cgroup has only" in str(error), error
                assert "SHMX_CAPACITY" in str(error), error
                break
        else:
            raise AssertionError(f"more than the limit of {LIMIT >> 20} MiB was given")
        for value, tensor in enumerate(given):
            tensor.fill_(value)
        # Without another 16 MiB for the result of a comparison.
        assert all(tensor.min() == tensor.max() == value for value, tensor in enumerate(given))
        print(f"{16 * len(given)} MiB of a limit of {LIMIT >> 20} MiB were given, then ENOSPC")
        given.clear()


def follow() -> None:
    import torch

    import shmx

    def write(limit: int, use: int, cache: int) -> None:
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{use}\n")
        (directory / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 1\n")

    def is_refused() -> bool:
        try:
            with shmx.Arena(capacity=64 * MIB) as arena:
                arena.share(torch.zeros(8 * MIB, dtype=torch.uint8))
        except shmx.ArenaFullError as error:
            assert "memory cgroup has only" in str(error), error
            return True
        return False

    (path,) = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    directory = ROOT / path.lstrip("/")
    directory.mkdir(parents=True, exist_ok=True)
    limit = 100 * MIB
    write(limit, limit - 7 * MIB, 0)
    assert is_refused()
    write(limit, limit - 9 * MIB, 0)
    assert not is_refused()
    write(limit, limit - 7 * MIB, 2 * MIB)
    assert not is_refused()
    write(limit, limit + MIB, 0)
    assert is_refused()
    (directory / "memory.max").write_text("max\n")
    assert not is_refused()
    # The tightest of the ancestors counts.
    write(1 << 40, 0, 0)
    assert not is_refused()


if __name__ == "__main__":
    {"fill": fill, "follow": follow}[sys.argv[1]]()
