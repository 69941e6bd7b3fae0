"""How many messages, and how many bytes, pass in a second with 8 messages in flight?

One producer keeps up to 8 messages on their way; every consumer opens each, checks its first and last element and
answers. A sample is one burst; the transports take turns burst by burst. After each burst one message more is compared
byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..exchange import Exchange, TransportError, serve
from ..options import Options
from ..payloads import Payload, Sources, parse
from ..process_tree import Place, run
from ..report import Report, Table
from ..transports import registry
from ..turns import rotated

__all__ = ["measure"]

SIZES = ("4KiB", "1MiB", "16MiB")
QUICK_SIZES = ("4KiB", "1MiB")
CONSUMERS = (1, 4)
TRANSPORTS = ("shmx", "iceoryx2", "vllm_arena", "pyshmem", "pickle")
ROUNDS = 20
IN_FLIGHT = 8
# A burst should last some 20 ms with the fast transports.
MESSAGES = {"4KiB": 200, "1MiB": 60}
FEWEST_MESSAGES = 24
_BOUND_S = 3600.0

Samples = dict[str, dict[str, list[float]]]
"""Messages per second by size and transport."""


def measure(options: Options) -> Report:
    """Measure bursts for all sizes and numbers of consumers."""
    transports, notes = registry.choose(options.transports, TRANSPORTS)
    payloads = [parse(size) for size in options.sizes or (QUICK_SIZES if options.quick else SIZES)]
    rounds = options.rounds_or(ROUNDS)
    report = Report("throughput", options={**vars(options), "rounds": rounds, "in_flight": IN_FLIGHT}, notes=notes)
    for consumers in options.consumers or ((1,) if options.quick else CONSUMERS):
        samples, failures = run(_produce, _consume, consumers, transports, payloads, rounds, bound_s=_BOUND_S)
        report.notes += [f"{consumers} consumer(s): {failure}" for failure in failures]
        report.tables += _tables(consumers, samples, payloads, transports)
    report.notes.append(
        "More is better; x is the peer's rate over that of shmx. Bytes are counted once per message, however many "
        "consumers read them."
    )
    return report


def _tables(consumers: int, samples: Samples, payloads: Sequence[Payload], order: Sequence[str]) -> list[Table]:
    title = f"up to {IN_FLIGHT} in flight, {consumers} consumer{'s' if consumers > 1 else ''}"
    messages = Table(f"messages per second, {title}", "1/s", baseline="shmx")
    traffic = Table(f"bytes per second, {title}", "GB/s", baseline="shmx")
    for name in order:
        for payload in payloads:
            for rate in samples[payload.name].get(name, []):
                messages.add(name, payload.name, rate)
                traffic.add(name, payload.name, rate * payload.nbytes / 1e9)
    return [messages, traffic]


# ---- processes ----


def _consume(place: Place, *arguments: object) -> None:
    serve(place)


def _produce(
    place: Place, transports: Sequence[str], payloads: Sequence[Payload], rounds: int
) -> tuple[Samples, list[str]]:
    samples: Samples = {payload.name: {} for payload in payloads}
    failures: list[str] = []
    with Exchange(place) as exchange:
        for payload in payloads:
            sources = Sources(payload, IN_FLIGHT)
            running = []
            for name in transports:
                try:
                    exchange.set_up(name, payload, IN_FLIGHT)
                    running.append(name)
                except TransportError as error:
                    failures.append(f"{payload.name}: {error}")
            messages = MESSAGES.get(payload.name, FEWEST_MESSAGES)
            # The first round warms up.
            for turn in range(rounds + 1):
                prepared = [
                    (serial, sources.stamped(serial)) for serial in range(turn * IN_FLIGHT, (turn + 1) * IN_FLIGHT)
                ]
                for name in rotated(list(running), turn):
                    try:
                        rate = messages / exchange.stream(name, prepared, messages, IN_FLIGHT)
                        exchange.turn(name, "view", *prepared[0], everything=True)
                    except TransportError as error:
                        failures.append(f"{payload.name}, round {turn}: {error}")
                        running.remove(name)
                        samples[payload.name].pop(name, None)
                        continue
                    if turn:
                        samples[payload.name].setdefault(name, []).append(rate)
            for name in list(exchange.producers):
                exchange.close(name)
    return samples, failures
