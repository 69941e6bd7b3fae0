"""The ``shmx`` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import shmx
from shmx.survey import counted, prospect, shown_bytes, shown_seconds

__all__ = ["main"]


def _gc(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="shmx gc", description="Remove arenas whose owners are gone, and say of every arena why or why not."
    )
    parser.add_argument("--force", action="store_true", help="give up messages that were never loaded at once")
    parser.add_argument("--dry-run", action="store_true", help="change nothing; say what would be removed")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = shmx.gc(force=arguments.force, dry_run=arguments.dry_run)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    for entry in report:
        print(f"{entry['name']}  {entry['outcome']}  {shown_bytes(entry['bytes'])}  {entry['reason']}")
    removed = "would be removed" if arguments.dry_run else "removed"
    print(f"{sum(entry['outcome'] == removed for entry in report)} {removed} of {len(report)}")
    return 0


def _ls(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="shmx ls",
        description="List the arenas in /dev/shm, and those without a name that a process of this user has open: "
        "owners, use, processes, messages. Changes nothing.",
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    arguments = parser.parse_args(argv)
    found = shmx.arenas()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for arena in found:
        for line in _lines_of(arena):
            print(line)
    total = sum(arena["memory_bytes"] for arena in found)
    removable = sum(prospect(arena)[0] == "removed" for arena in found)
    hint = f"; {removable} can be removed: shmx gc" if removable else ""
    print(f"{counted(len(found), 'arena')}, {shown_bytes(total)} of shared memory{hint}")
    return 0


def _lines_of(arena: dict[str, Any]) -> list[str]:
    size = shown_bytes(arena["memory_bytes"])
    kind = " (memfd)" if arena["backend"] == "memfd" else ""
    if arena["state"] not in ("alive", "orphan"):
        trouble = arena["trouble"] or f"user id {arena['uid']}"
        return [f"{arena['name']}{kind}  {arena['state']}  {size}  {trouble}"]
    owner = f"pid {arena['owner_pid']}"
    if arena["state"] == "orphan":
        owner += " has ended" if arena["owner_left"] else " has died"
    lines = [
        f"{arena['name']}{kind}  {arena['state']}  {owner}  {shown_bytes(arena['reserved_bytes'])} of "
        f"{shown_bytes(arena['capacity'])} taken, "
        f"{counted(arena['segments'], 'segment')}"
    ]
    lines.append(f"  {counted(arena['blocks_in_use'], 'block')} in use, {shown_bytes(arena['bytes_in_use'])}")
    if arena["messages"]:
        expired = f", {arena['expired_messages']} of them past the time-to-live" if arena["expired_messages"] else ""
        lines.append(
            f"  {counted(arena['messages'], 'message')} with {counted(arena['loads_to_come'], 'load')} to come, "
            f"the oldest for {shown_seconds(arena['oldest_message_seconds'])}{expired}"
        )
    for peer in arena["peers"]:
        role = "owner" if peer["slot"] == 0 else f"slot {peer['slot']}"
        life = "alive" if peer["alive"] else "dead"
        lines.append(
            f"  {role}  pid {peer['pid']}  {life}  holds {counted(peer['blocks'], 'block')}, "
            f"{shown_bytes(peer['bytes'])}"
        )
    return lines


def _doctor(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="shmx doctor",
        description="Check what this machine allows. The status is 1 if something that shmx needs is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments = parser.parse_args(argv)
    from shmx import doctor

    findings = doctor.diagnose()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(one) for one in findings], indent=2))
    else:
        for one in findings:
            print(f"{one.status:4}  {one.check:13}  {one.finding}")
            if one.remedy:
                print(f"{'':6}{'':13}    -> {one.remedy}")
    return int(any(one.status == "fail" for one in findings))


def _demo(argv: Sequence[str]) -> int:
    from shmx.bench import demo

    return int(demo.main(list(argv)))


def _bench(argv: Sequence[str]) -> int:
    from shmx.bench import runner

    return int(runner.main(argv))


_COMMANDS = {
    "bench": (_bench, "measurements beside the lower bounds of the machine and beside other transports"),
    "demo": (_demo, "the main job on real photographs: a tokenizer process, ZMQ, a gloo broadcast, N ranks"),
    "doctor": (_doctor, "what this machine allows: /dev/shm, memory limits, locks, huge pages, driver; with remedies"),
    "gc": (_gc, "remove arenas whose owners are gone"),
    "ls": (_ls, "the arenas in /dev/shm: owners, use, processes, messages"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _COMMANDS:
        return _COMMANDS[arguments[0]][0](arguments[1:])
    lines = [f"  {name:6} {text}" for name, (_, text) in _COMMANDS.items()]
    usage = "usage: shmx COMMAND [options]\n\n" + "\n".join(lines) + "\n\nshmx COMMAND --help tells the options."
    if arguments and arguments[0] == "--version":
        print(shmx.__version__)
        return 0
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    print(usage if not arguments else f"shmx: no such command: {arguments[0]}\n\n{usage}", file=sys.stderr)
    return 2
