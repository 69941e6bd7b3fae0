"""A /dev/shm of one's own, of any size, for a command in a mount namespace."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BOUND_S = 120
SHM = Path("/dev/shm")


def in_own_shm(command: list[str], nbytes: int, bound_s: float = BOUND_S) -> subprocess.CompletedProcess[str]:
    mount = f'mount -t tmpfs -o size={nbytes} tmpfs /dev/shm && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", *command],
        capture_output=True,
        text=True,
        timeout=bound_s,
        check=False,
    )


@functools.cache
def refusal() -> str | None:
    """Why there is no /dev/shm of one's own to be had here."""
    if shutil.which("unshare") is None:
        return "unshare (util-linux) is not installed"
    tried = in_own_shm(["true"], 1 << 20)
    return f"no mount namespace of one's own here: {tried.stderr.strip()}" if tried.returncode != 0 else None


def run_scenario(module: str, name: str, nbytes: int, bound_s: float = BOUND_S) -> str:
    """Run a scenario of a test module in a process of its own; answers what it printed before ``held``."""
    if (reason := refusal()) is not None:
        pytest.skip(reason)
    ended = in_own_shm([sys.executable, "-m", module, name], nbytes, bound_s)
    assert ended.returncode >= 0, f"ended by signal {-ended.returncode}"
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("held\n"), ended.stdout
    return ended.stdout.removesuffix("held\n")


def names() -> list[str]:
    return sorted(path.name for path in SHM.iterdir())


def wait_for_the_dead(living: int = 0) -> None:
    """Until the kernel has let go of the locks of all but so many peers; the pipes of the killed may end earlier."""
    import shmx

    deadline = time.monotonic() + BOUND_S
    while sum(peer["alive"] for arena in shmx.arenas() for peer in arena.get("peers", ())) > living:
        assert time.monotonic() < deadline, "a killed process goes on using its arena"


def free_bytes() -> int:
    facts = os.statvfs(SHM)
    return facts.f_bavail * facts.f_frsize


def used_bytes() -> int:
    facts = os.statvfs(SHM)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize
