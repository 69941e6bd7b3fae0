"""What tests ask about blocks: which one a handle names, what an arena counts, which names it has."""

from __future__ import annotations

import os
import re

import shmx


def block_of(handle: shmx.SharedTensor) -> tuple[str, int]:
    """Arena name and block number."""
    found = re.search(r"/(shmx-[0-9a-f]{16}) block (\d+) ", repr(handle) + " ")
    assert found is not None, repr(handle)
    return found[1], int(found[2])


def generation_of(handle: shmx.SharedTensor) -> int:
    found = re.search(r" generation (\d+)", repr(handle))
    assert found is not None, repr(handle)
    return int(found[1])


def messages(arena: shmx.Arena | None = None) -> int:
    """Messages with loads to come."""
    return (arena or shmx.default_arena()).stats()["messages"]


def names_of(arena: shmx.Arena) -> set[str]:
    """The files of an arena in /dev/shm."""
    prefix = arena.name.removeprefix("/")
    return {name for name in os.listdir("/dev/shm") if name == prefix or name.startswith(prefix + ".")}
