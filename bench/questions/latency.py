"""How long until consumers can read, or own, what a producer has put?

Every transport moves the same tensors over the same ZMQ sockets in one tree of processes; inside every round they take
turns, in changing order. The time runs from before `put` in the producer until the last consumer has its tensors (one
clock for all processes). Contents are checked outside that time: 64 places of every tensor of every message, and all
bytes every few rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .. import malloc_policy
from ..exchange import Exchange, TransportError, serve
from ..options import Options
from ..payloads import MM32, Payload, Sources, parse
from ..process_tree import Place, run
from ..report import Check, Report, Table, paired_ratio
from ..transports import registry
from ..turns import rotated

__all__ = ["measure"]

SIZES = ("4KiB", "64KiB", "1MiB", "16MiB", "64MiB", "128MiB", MM32)
QUICK_SIZES = ("4KiB", "1MiB")
CONSUMERS = (1, 4)
MODES = ("view", "own")
ROUNDS = 30
WARM_UP = 5
EVERYTHING_EVERY = 5
_BOUND_S = 3600.0

# Least ratio of the fastest peer's time to ours, and of the time of those that make fresh segments.
_PEERS = ("iceoryx2", "vllm_arena", "vllm_storage", "pyshmem", "sglang", "segment", "torch_fs", "torch_fd", "pickle5")
_PEERS += ("pickle", "ray")
_NOT_SLOWER = 0.95
_VIEW_GAIN = {"16MiB": 1.15, "64MiB": 1.3, "128MiB": 1.3, MM32: 1.3}
_FRESH = ("segment", "torch_fs", "torch_fd")
_FRESH_VIEW_GAIN = 5.0
_FRESH_VIEW_SIZES = ("1MiB", "16MiB", "64MiB", "128MiB", MM32)
_SEGMENT_OWN_GAIN = {1: 8.0, 4: 3.0}
_SEGMENT_OWN_SIZES = ("16MiB", "64MiB", "128MiB", MM32)

Samples = dict[str, dict[str, dict[str, list[float]]]]
"""Microseconds by mode, size and transport."""


def measure(options: Options) -> Report:
    """Measure view and own for all sizes and numbers of consumers."""
    transports, notes = registry.choose(options.transports)
    payloads = [parse(size) for size in options.sizes or (QUICK_SIZES if options.quick else SIZES)]
    rounds = options.rounds_or(ROUNDS)
    warm_up = 1 if options.quick else WARM_UP
    report = Report("latency", options={**vars(options), "rounds": rounds, "warm_up": warm_up}, notes=notes)
    for consumers in options.consumers or ((1,) if options.quick else CONSUMERS):
        samples, failures = run(
            _produce, _consume, consumers, transports, payloads, rounds, warm_up, options.malloc, bound_s=_BOUND_S
        )
        report.notes += [f"{consumers} consumers: {failure}" for failure in failures]
        tables = {mode: _table(mode, consumers, samples[mode], transports) for mode in MODES}
        report.tables += tables.values()
        report.checks += _checks(tables["view"], tables["own"], consumers)
    report.notes += [
        f"Owned copies: malloc policy '{options.malloc}' in every consumer ({malloc_policy.POLICIES[options.malloc]}). "
        "shmx materializes into recycled memory of its own, pyshmem into arrays that its adapter recycles.",
        "pickle, pickle5 and vllm_storage have no views: what is theirs under 'view' is an owned copy. sglang's owned "
        "tensors are copied when they are touched, so only the question broadcast compares them.",
    ]
    return report


def _table(mode: str, consumers: int, samples: dict[str, dict[str, list[float]]], order: Sequence[str]) -> Table:
    what = {"view": "put until the last consumer can read", "own": "put until the last consumer owns a copy"}[mode]
    table = Table(f"{what}, {consumers} consumer{'s' if consumers > 1 else ''}", "us", baseline="shmx")
    for name in order:
        cells = {size: cell[name] for size, cell in samples.items() if name in cell}
        if cells:
            table.samples[name] = cells
    return table


# ---- marks ----


def _checks(view: Table, own: Table, consumers: int) -> list[Check]:
    """Mark 1. Paired by round; a peer's ratio is its time over ours."""
    checks = []
    for table in (view, own):
        what = "view" if table is view else "own"
        for size in table.columns():
            where = f"{what} {size}, {consumers} consumers"
            best, ratio = _fastest_peer(table, size)
            if best:
                limit = _VIEW_GAIN.get(size, _NOT_SLOWER) if table is view else _NOT_SLOWER
                checks.append(_check(f"{where}: fastest peer ({best}) / shmx", ratio, limit))
            for peer in _FRESH if table is view and size in _FRESH_VIEW_SIZES else ():
                checks.append(_check(f"{where}: {peer} / shmx", _ratio(table, peer, size), _FRESH_VIEW_GAIN))
            if table is own and size in _SEGMENT_OWN_SIZES and consumers in _SEGMENT_OWN_GAIN:
                limit = _SEGMENT_OWN_GAIN[consumers]
                checks.append(_check(f"{where}: segment / shmx", _ratio(table, "segment", size), limit))
    return [check for check in checks if not math.isnan(check.value)]


def _fastest_peer(table: Table, size: str) -> tuple[str, float]:
    """The peer with the least paired ratio, that is the one that is hardest to beat."""
    ratios = {peer: _ratio(table, peer, size) for peer in _PEERS}
    measured = {peer: ratio for peer, ratio in ratios.items() if not math.isnan(ratio)}
    best = min(measured, key=measured.__getitem__, default="")
    return best, measured.get(best, math.nan)


def _ratio(table: Table, peer: str, size: str) -> float:
    ours, theirs = (table.samples.get(row, {}).get(size, []) for row in ("shmx", peer))
    return paired_ratio(theirs, ours) if len(ours) == len(theirs) else math.nan


def _check(mark: str, value: float, limit: float) -> Check:
    return Check(mark, value, f">= {limit:g}", value >= limit)


# ---- processes ----


def _consume(place: Place, *arguments: Any) -> None:
    malloc = arguments[-1]
    serve(place, lambda: malloc_policy.apply(malloc))


def _produce(
    place: Place, transports: Sequence[str], payloads: Sequence[Payload], rounds: int, warm_up: int, malloc: str
) -> tuple[Samples, list[str]]:
    samples: Samples = {mode: {payload.name: {} for payload in payloads} for mode in MODES}
    failures: list[str] = []
    with Exchange(place) as exchange:
        for payload in payloads:
            _measure_payload(exchange, transports, payload, rounds, warm_up, samples, failures)
    return samples, failures


def _measure_payload(
    exchange: Exchange,
    transports: Sequence[str],
    payload: Payload,
    rounds: int,
    warm_up: int,
    samples: Samples,
    failures: list[str],
) -> None:
    sources = Sources(payload)
    running: dict[str, list[str]] = {mode: [] for mode in MODES}
    for name in transports:
        try:
            exchange.set_up(name, payload)
        except TransportError as error:
            failures.append(f"{payload.name}: {error}")
            continue
        for mode in MODES:
            if not (mode == "own" and name == "sglang"):
                running[mode].append(name)
    serial = 0
    for turn in range(warm_up + rounds):
        for mode in MODES:
            serial += 1
            tensors = sources.stamped(serial)
            for name in list(rotated(running[mode], turn)):
                try:
                    _, elapsed = exchange.turn(name, mode, serial, tensors, everything=turn % EVERYTHING_EVERY == 0)
                except TransportError as error:
                    # Its samples would no longer be paired with those of the others.
                    failures.append(f"{payload.name}, {mode}, round {turn}: {error}")
                    for other in MODES:
                        samples[other][payload.name].pop(name, None)
                        running[other] = [which for which in running[other] if which != name]
                    continue
                if turn >= warm_up:
                    samples[mode][payload.name].setdefault(name, []).append(elapsed)
    for name in list(exchange.producers):
        exchange.close(name)
