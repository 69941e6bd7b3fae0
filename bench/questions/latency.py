"""How long until consumers can read, or own, what a producer has put?

Every transport moves the same tensors over the same ZMQ sockets in one tree of processes; inside every round they take
turns, in changing order. The time runs from before `put` in the producer until the last consumer has its tensors (one
clock for all processes). Contents are checked outside that time: 64 places of every tensor of every message, and all
bytes every few rounds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

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
CHANNEL = "(the channel alone)"
ROUNDS = 30
WARM_UP = 4
EVERYTHING_EVERY = 5
_BOUND_S = 3600.0

# Least ratio of the fastest peer's time to ours, and of the time of those that make fresh segments.
_PEERS = tuple(name for name in registry.ALL if name != "shmx")
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
        plan = _Rounds(rounds, warm_up, options.modes or MODES)
        samples, failures = run(
            _produce, _consume, consumers, transports, payloads, plan, options.malloc, bound_s=_BOUND_S
        )
        report.notes += [f"{consumers} consumer(s): {failure}" for failure in failures]
        tables = {mode: _table(mode, consumers, samples[mode], transports) for mode in plan.modes}
        report.tables += tables.values()
        report.checks += [check for mode, table in tables.items() for check in _checks(mode, table, consumers)]
    report.notes += [
        f"{CHANNEL} is a message without content: what no transport can be faster than here.",
        f"Owned copies: malloc policy '{options.malloc}' in every consumer ({malloc_policy.POLICIES[options.malloc]}). "
        "shmx materializes into recycled memory of its own, pyshmem into arrays that its adapter recycles.",
        "pickle, pickle5 and vllm_storage have no views: what is theirs under 'view' is an owned copy. sglang's owned "
        "tensors are copied when they are touched, so only the question broadcast compares them.",
    ]
    return report


def _table(mode: str, consumers: int, samples: dict[str, dict[str, list[float]]], order: Sequence[str]) -> Table:
    what = {"view": "put until the last consumer can read", "own": "put until the last consumer owns a copy"}[mode]
    table = Table(f"{what}, {consumers} consumer{'s' if consumers > 1 else ''}", "us", baseline="shmx")
    for name in (*order, CHANNEL):
        cells = {size: cell[name] for size, cell in samples.items() if name in cell}
        if cells:
            table.samples[name] = cells
    return table


# ---- marks ----


def _checks(mode: str, table: Table, consumers: int) -> list[Check]:
    """Mark 1. Paired by round; a peer's ratio is its time over ours."""
    checks = []
    for size in table.columns():
        where = f"{mode} {size}, {consumers} consumer{'s' if consumers > 1 else ''}"
        best, ratio = _fastest_peer(table, size)
        if best:
            limit = _VIEW_GAIN.get(size, _NOT_SLOWER) if mode == "view" else _NOT_SLOWER
            checks.append(_check(f"{where}: fastest peer ({best}) / shmx", ratio, limit))
        for peer in _FRESH if mode == "view" and size in _FRESH_VIEW_SIZES else ():
            checks.append(_check(f"{where}: {peer} / shmx", _ratio(table, peer, size), _FRESH_VIEW_GAIN))
        if mode == "own" and size in _SEGMENT_OWN_SIZES and consumers in _SEGMENT_OWN_GAIN:
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


@dataclass(frozen=True)
class _Rounds:
    count: int
    warm_up: int
    modes: tuple[str, ...]


def _consume(
    place: Place, transports: Sequence[str], payloads: Sequence[Payload], rounds: _Rounds, malloc: str
) -> None:
    malloc_policy.apply(malloc)
    serve(place)


def _produce(
    place: Place, transports: Sequence[str], payloads: Sequence[Payload], rounds: _Rounds, malloc: str
) -> tuple[Samples, list[str]]:
    samples: Samples = {mode: {payload.name: {} for payload in payloads} for mode in rounds.modes}
    failures: list[str] = []
    with Exchange(place) as exchange:
        for payload in payloads:
            _measure_payload(exchange, transports, payload, rounds, samples, failures)
    return samples, failures


def _measure_payload(
    exchange: Exchange,
    transports: Sequence[str],
    payload: Payload,
    rounds: _Rounds,
    samples: Samples,
    failures: list[str],
) -> None:
    sources = Sources(payload)
    running: list[str] = []
    for name in transports:
        try:
            exchange.set_up(name, payload)
            running.append(name)
        except TransportError as error:
            failures.append(f"{payload.name}: {error}")
    serials = itertools.count()
    for turn, mode in itertools.product(range(rounds.warm_up + rounds.count), rounds.modes):
        serial = next(serials)
        tensors = sources.stamped(serial)
        everything = turn % EVERYTHING_EVERY == 0
        for name in rotated([name for name in running if (mode, name) != ("own", "sglang")], turn):
            try:
                _, elapsed = exchange.turn(name, mode, serial, tensors, everything=everything)
            except TransportError as error:
                failures.append(f"{payload.name}, {mode}, round {turn}: {error}")
                running.remove(name)
                # What is left of its samples could not be paired with those of the others.
                for cells in samples.values():
                    cells[payload.name].pop(name, None)
                continue
            if turn >= rounds.warm_up:
                samples[mode][payload.name].setdefault(name, []).append(elapsed)
        if turn >= rounds.warm_up:
            samples[mode][payload.name].setdefault(CHANNEL, []).append(exchange.ping())
    for name in list(exchange.producers):
        exchange.close(name)
