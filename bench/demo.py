"""The main job of shmx on real photographs: ``shmx demo``.

One request carries the ``pixel_values`` of 32 images from a tokenizer process to all ranks of a model; three
transports take turns and are compared in one table. `demo_run` has the path and what is measured on it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shmx

from .demo_transports import TRANSPORTS

if TYPE_CHECKING:
    from .demo_run import Message, Ready

__all__ = ["main", "parse", "summarize"]

EXTRAS = {"zmq": "pyzmq", "PIL": "pillow", "numpy": "numpy", "rich": "rich", "skimage": "scikit-image"}
SHM = Path("/dev/shm")
MIB = 1 << 20
# Control structures, and the last pages of segments.
SHM_SLACK = 32 * MIB
STATUS_OK, STATUS_FAILED, STATUS_USAGE, STATUS_INTERRUPTED = 0, 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration and print what it measured.

    Parameters
    ----------
    argv : list of str, optional
        Arguments of ``shmx demo``; those of the process if not given.

    Returns
    -------
    int
        0; 1 if shmx lost or corrupted a tensor or left a name in /dev/shm, or if the run failed; 2 if it could not
        start; 130 after ctrl-C.
    """
    options = parse(argv)
    missing = [
        package
        for module, package in EXTRAS.items()
        if importlib.util.find_spec(module) is None and not (module == "skimage" and options.images)
    ]
    if missing:
        print(f"shmx demo: {', '.join(missing)} not installed: pip install 'torch-shmx[demo]'", file=sys.stderr)
        return STATUS_USAGE

    from .demo_run import DemoError

    try:
        result = _run(options)
    except DemoError as error:
        print(f"shmx demo: {error}", file=sys.stderr)
        return STATUS_USAGE if error.usage else STATUS_FAILED
    except KeyboardInterrupt:
        print("shmx demo: interrupted", file=sys.stderr)
        return STATUS_INTERRUPTED
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        _print_table(result)
    return STATUS_OK if result["ok"] else STATUS_FAILED


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; a wrong one ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="shmx demo",
        description="Move requests with the pixel_values of real photographs from a tokenizer process to the ranks "
        "of a model: by shmx, by inline pickle, and by one shared-memory segment per tensor; compare them. "
        "The defaults take about a minute on 2 cores, less than 6 GB of memory and 1 GB of /dev/shm.",
        epilog="Exit status: 0; 1 if shmx lost or corrupted a tensor or left a name in /dev/shm, or if the run "
        "failed; 2 if it could not start; 130 after ctrl-C.",
    )
    parser.add_argument(
        "--requests",
        type=_positive,
        default=6,
        metavar="N",
        help="requests per transport; the first is reported as cold (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks",
        type=_positive,
        default=4,
        metavar="N",
        help="processes that receive each request (default: %(default)s)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="use the jpg, png and webp files of this directory, the first 32 by name "
        "(default: 32 images cut from the photographs that scikit-image ships)",
    )
    parser.add_argument(
        "--transports",
        type=_transport_names,
        default=TRANSPORTS,
        metavar="A,B",
        help="some of shmx, inline (pickle of the tensors), segment (a fresh shared-memory segment per tensor, the "
        "class of SGLang pull request #21465) (default: all three)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout, and nothing else")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _transport_names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in TRANSPORTS:
            raise argparse.ArgumentTypeError(f"no transport {name!r}; choose from {', '.join(TRANSPORTS)}")
    return names


def _run(options: argparse.Namespace) -> dict[str, Any]:
    from . import images
    from .demo_run import DemoError, Plan, Processes
    from .reference_segment import remove_left

    if options.images:
        try:
            images.image_files(options.images)
        except images.ImageSourceError as error:
            raise DemoError(str(error), usage=True) from error
    plan = Plan.make(options.ranks, options.images)
    messages: list[Message] = []
    try:
        with _progress(options.requests * len(options.transports)) as advance, Processes(plan) as processes:
            advance("starting the processes, decoding and patching the photographs", 0)
            ready = processes.ready()
            in_shm = {"shmx", "segment"} & set(options.transports)
            _require_shm(len(in_shm) * (ready.payload_bytes + SHM_SLACK))
            for request, transport in _turns(options.requests, options.transports):
                advance(f"request {request + 1}, {transport}", 0)
                messages.append(processes.send(request, transport))
                advance(_progress_text(messages[-1]), 1)
    finally:
        segments_left = remove_left(plan.segment_prefix)
        shmx.gc()
    left = {"segment": segments_left, "shmx": sorted(path.name for path in SHM.glob(f"{ready.arena}*"))}
    return summarize(options, ready, messages, left)


def _turns(requests: int, transports: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Let the transports take turns, and another one begin each time: none always follows the same one."""
    for request in range(requests):
        first = request % len(transports)
        for transport in transports[first:] + transports[:first]:
            yield request, transport


def _require_shm(needed: int) -> None:
    """Refuse in time what would end in SIGBUS later: a segment takes its pages when they are first written."""
    from .demo_run import DemoError

    free = shutil.disk_usage(SHM).free
    if free < needed:
        raise DemoError(
            f"{SHM} has {free / MIB:.0f} MiB free, and the run needs {needed / MIB:.0f}: enlarge it "
            "(docker run --shm-size=2g), or send fewer or smaller images (--images DIR)",
            usage=True,
        )


def summarize(
    options: argparse.Namespace, ready: Ready, messages: list[Message], left: dict[str, list[str]]
) -> dict[str, Any]:
    """Condense the messages of a run into what ``--json`` prints.

    Parameters
    ----------
    options : argparse.Namespace
        As `parse` returns them.
    ready : demo_run.Ready
        What a request carried.
    messages : list of demo_run.Message
        All that were sent.
    left : dict
        Per transport the names that it has left in /dev/shm.

    Returns
    -------
    dict
        Made of what JSON knows. ``ok`` is false if shmx lost or corrupted a tensor or left a name.
    """
    transports = {}
    for name in options.transports:
        own = [message for message in messages if message.transport == name]
        errors = sum((Counter(message.errors) for message in own), Counter[str]())
        transports[name] = {
            "cold": _phase(own[:1]),
            "steady": _phase(own[1:] or own),
            "loads": sum(message.loads for message in own),
            "lost": sum(message.lost for message in own),
            "wrong": sum(message.wrong for message in own),
            "errors": dict(errors),
            "left": left.get(name, []),
        }
    judged = transports.get("shmx", {})
    return {
        "ok": not (judged and (judged["lost"] or judged["wrong"] or judged["left"])),
        "ranks": options.ranks,
        "requests": options.requests,
        "images": ready.images,
        "payload_bytes": ready.payload_bytes,
        "source": str(options.images or "photographs in scikit-image"),
        "cores": len(os.sched_getaffinity(0)),
        "transports": transports,
        "messages": [asdict(message) for message in messages],
    }


def _phase(messages: list[Message]) -> dict[str, float | None]:
    medians = {
        name: _median(getattr(message, name) for message in messages)
        for name in ("wire_bytes", "publish_ms", "owned_ms", "producer_faults", "rank_faults")
    }
    return {**medians, "lost": sum(message.lost for message in messages)}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# ---- the terminal ----


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Show progress on stderr: a bar on a terminal, a line per message elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:

        def say(text: str, steps: int) -> None:
            if steps:
                print(text, file=sys.stderr, flush=True)

        yield say
        return

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    # No refreshing thread: it would compete with the processes that are measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def draw(text: str, steps: int) -> None:
            bar.update(task, description=text, advance=steps, refresh=True)

        yield draw


def _progress_text(message: Message) -> str:
    time = "no rank got it all" if message.owned_ms is None else f"{message.owned_ms:.1f} ms"
    lost = f", {message.lost} of {message.loads} lost" if message.lost else ""
    return f"request {message.request + 1}, {message.transport}: {time}{lost}"


def _print_table(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    transports: dict[str, dict[str, Any]] = result["transports"]
    # shmx first, whatever the order of the transports: it is what the others are compared with.
    names = sorted(transports, key=lambda name: name != "shmx")
    compared = names[0] == "shmx"
    table = Table(
        title=f"{result['images']} images, {_bytes(result['payload_bytes'])} of pixel_values per request, "
        f"to {result['ranks']} ranks",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("per request")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
        if compared and name != "shmx":
            table.add_column("/ shmx", justify="right", no_wrap=True, style="dim")

    def add(label: str, show: Callable[[dict[str, Any]], str], value: Callable[[dict[str, Any]], float | None]) -> None:
        cells = []
        for name in names:
            cells.append(show(transports[name]))
            if compared and name != "shmx":
                cells.append(_ratio(value(transports[name]), value(transports["shmx"])))
        table.add_row(label, *cells)

    def measured(label: str, phase: str, key: str, form: Callable[[float], str]) -> None:
        def show(transport: dict[str, Any]) -> str:
            value = transport[phase][key]
            partly = key == "owned_ms" and transport[phase]["lost"]
            return ("-" if value is None else form(value)) + (" †" if partly else "")

        # Page faults come out as none at all or by the ten thousand: a ratio would say nothing.
        add(label, show, lambda transport: None if form is _count else transport[phase][key])

    def counted(label: str, show: Callable[[dict[str, Any]], str]) -> None:
        add(label, show, lambda transport: None)

    measured("on the wire", "steady", "wire_bytes", _bytes)
    measured("publish", "steady", "publish_ms", _milliseconds)
    measured("last rank owns all", "steady", "owned_ms", _milliseconds)
    measured("same, first request", "cold", "owned_ms", _milliseconds)
    measured("page faults, producer", "steady", "producer_faults", _count)
    measured("page faults, ranks", "steady", "rank_faults", _count)
    table.add_row("whole run", style="bold")
    counted("tensors lost", lambda transport: f"{transport['lost']:,} of {transport['loads']:,}")
    counted("wrong checksums", lambda transport: f"{transport['wrong']:,}")
    counted("left in /dev/shm", lambda transport: f"{len(transport['left']):,}")
    console = Console()
    console.print(table)
    console.print(_footer(result), highlight=False, style="dim")


def _bytes(number: float) -> str:
    return f"{number / MIB:.1f} MiB" if number >= MIB else f"{number / 1024:.1f} KiB"


def _milliseconds(number: float) -> str:
    return f"{number:,.1f} ms"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _ratio(value: float | None, baseline: float | None) -> str:
    if value is None or not baseline:
        return ""
    ratio = value / baseline
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.1f}"


def _footer(result: dict[str, Any]) -> str:
    steady = max(1, result["requests"] - 1)
    lines = [
        f"Medians of {steady} steady-state requests; the first is cold and also warms malloc, which keeps or returns "
        "freed memory by rules of its own, so page faults of copies vary from run to run.",
        f"Transports take turns within one run on {result['cores']} cores. Images: {result['source']}.",
        "On the wire: the ZMQ message and the gloo broadcast, each counted once. Times: CLOCK_MONOTONIC, from before "
        "publish in the producer until the last rank has its own copies; CRC-32 checksums of every tensor are compared "
        "after that. Page faults: ru_minflt.",
    ]
    for name, transport in result["transports"].items():
        if transport["lost"]:
            errors = ", ".join(f"{error} x {count:,}" for error, count in transport["errors"].items())
            lines.append(f"† {name} lost tensors ({errors}): its time is that of the ranks that lost none.")
    return "\n".join(lines)
