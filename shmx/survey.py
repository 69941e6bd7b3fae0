"""What lies in /dev/shm, or has no name: every arena, who owns and uses it, and which may be removed and why."""

from __future__ import annotations

import os
from typing import Any

from shmx import _core

__all__ = ["arenas", "counted", "prospect", "shown_bytes", "shown_seconds"]


def arenas() -> list[dict[str, Any]]:
    """Look at every arena in /dev/shm from outside: nothing is attached, changed or kept.

    Liveness is asked of the kernel, by the lock that each process has on its slot. Process ids are as the processes
    wrote them, each in its own PID namespace.

    Returns
    -------
    list of dict
        For every arena:

        - ``name``, ``backend`` (``"shm"``, or ``"memfd"``: one without a name, which is found only while a process of
          this user that may be looked into has it open), ``uid``, ``memory_bytes`` (of all its files, as the kernel
          counts), ``attached`` (this process takes part in it);
        - ``state``: ``"alive"``, ``"orphan"`` (its owner is gone), ``"starting"``, ``"torn"`` (its creation was
          interrupted), ``"headless"`` (data without a control segment), ``"foreign"`` (another user's, not opened),
          ``"other version"`` (of a shmx with another layout) or ``"damaged"``, and ``trouble``, what is wrong.

        For those that are alive or orphans also ``owner_pid``, ``owner_left`` (it ended in order), ``capacity``,
        ``reserved_bytes`` (what of it has been taken from the system), ``ticket_ttl``, ``segments``,
        ``blocks_in_use`` and ``bytes_in_use`` (held, or with loads to come), ``messages``, ``expired_messages``,
        ``loads_to_come``, ``oldest_message_seconds``, and ``peers``: ``slot``, ``pid``, ``alive``, ``blocks`` and
        ``bytes`` of each process that is alive or has left holds behind. Slot 0 is the owner's. The numbers are read
        while others go on, one after another.
    """
    return _core.survey()


def prospect(arena: dict[str, Any], *, force: bool = False) -> tuple[str, str]:
    """Say what :func:`shmx.gc` would do with an arena of :func:`arenas`: its outcome, and why."""
    if arena["attached"]:
        return "in use", "this process takes part in it"
    if arena["backend"] == "memfd":
        return "in use", "it has no name: the kernel frees it with the last process that uses it"
    state = arena["state"]
    if state == "orphan" and arena["uid"] != os.geteuid():
        return ("not ours", f"it belongs to user id {arena['uid']}, whose processes remove it")
    if state == "orphan":
        return _prospect_of_an_orphan(arena, force)
    if state == "headless":
        what = "data segments without a control segment"
        return ("removed", what) if force else ("not ours", f"{what}; gc --force removes them")
    return {
        "alive": ("owner alive", f"process {arena.get('owner_pid')} owns it"),
        "starting": ("owner alive", "it is being made at this moment"),
        "torn": ("removed", "its creation was interrupted"),
        "foreign": ("not ours", f"it belongs to user id {arena['uid']}"),
        "other version": ("not ours", f"{arena['trouble']}; that version's gc removes it"),
        "damaged": ("not ours", f"{arena['trouble']}; remove its files from /dev/shm by hand"),
    }[state]


def _prospect_of_an_orphan(arena: dict[str, Any], force: bool) -> tuple[str, str]:
    # What the reaper takes into account, in its order: holds of live processes, then messages.
    users = [peer for peer in arena["peers"] if peer["alive"] and peer["slot"] != 0]
    holders = ", ".join(
        f"process {peer['pid']} ({counted(peer['blocks'], 'block')}, {shown_bytes(peer['bytes'])})"
        for peer in users
        if peer["blocks"]
    )
    owner = f"its owner, process {arena['owner_pid']}, has {'ended' if arena['owner_left'] else 'died'}"
    if holders:
        return "in use", f"{owner}; held by {holders}"
    waiting = arena["messages"] if users else arena["messages"] - arena["expired_messages"]
    if waiting and not force:
        oldest = shown_seconds(arena["oldest_message_seconds"])
        until = (
            "kept while a process is attached"
            if users
            else f"given up after {shown_seconds(arena['ticket_ttl'])}, or with --force"
        )
        return "in use", f"{owner}; {counted(waiting, 'message')} not loaded yet, the oldest for {oldest}, {until}"
    given_up = f"; {counted(arena['messages'], 'message')} given up" if arena["messages"] else ""
    return "removed", f"{owner} and nobody uses it{given_up}"


def counted(number: int, what: str) -> str:
    """Write ``1 block``, ``2 blocks``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def shown_bytes(number: int) -> str:
    """Write a number of bytes for people."""
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def shown_seconds(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
