"""The ``shmx`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import shmx

__all__ = ["main"]


def _gc(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="shmx gc", description="Remove arenas whose owners are gone.")
    parser.add_argument("--force", action="store_true", help="give up messages that were never loaded at once")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = shmx.gc(force=arguments.force)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        for entry in report:
            print(f"{entry['name']}  {entry['outcome']}  {entry['bytes'] / 2**20:.1f} MiB")
        print(f"{sum(entry['outcome'] == 'removed' for entry in report)} removed of {len(report)}")
    return 0


def _demo(argv: Sequence[str]) -> int:
    from shmx.bench import demo

    return int(demo.main(list(argv)))


def _bench(argv: Sequence[str]) -> int:
    from shmx.bench import runner

    return int(runner.main(argv))


_COMMANDS = {
    "bench": (_bench, "measurements beside the lower bounds of the machine and beside other transports"),
    "demo": (_demo, "the main job on real photographs: a tokenizer process, ZMQ, a gloo broadcast, N ranks"),
    "gc": (_gc, "remove arenas whose owners are gone"),
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
