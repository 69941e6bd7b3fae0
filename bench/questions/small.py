"""What does a small object cost to share, to pickle, to load and to give back?

In one process, with caches that hold nothing else and with caches that have just been used for something else, and
between two processes that also exchange ZMQ round trips in the same rounds. The bytes are few, so this is the price of
the machinery itself.
"""

from __future__ import annotations

import itertools
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

import shmx

from ..contenders import Contender, clock, take_turns
from ..options import Options
from ..process_tree import MeasurementError
from ..report import Check, Report, Table, paired_ratio, size_text
from ..transports import interface, registry
from ..turns import rotated
from ..worker import Worker

__all__ = ["measure"]

BATCH = 64
SMALL, LARGE = 4 << 10, 128 << 20
QUICK_LARGE = 1 << 20
# Messages of one block, which has ten cells for them.
ONE_BLOCK = 8
ROUND_TRIPS = 16
CALL_BOUND = 30_000
STEP_WARM_UP = 20

PICKLE_LIMIT = 8.0
SHARE_LIMIT = 0.1
LOAD_LIMIT = 0.5
# Single cells of one run differ by so much on a busy machine.
SAME = 1.25


# What a service does between two messages, as far as the caches are concerned.
OTHER_DATA = 8 << 20
# The transports that are the fastest for small messages in `latency`.
TRANSPORTS = ("shmx", "iceoryx2", "sharedvector")


class Plain:
    """The least that a Python class with three fields can be."""

    def __init__(self, name: str, size: int, offset: int) -> None:
        self.name = name
        self.size = size
        self.offset = offset


def _each(operation: Callable[[], object]) -> Callable[[], float]:
    """Microseconds per call, over a batch; results are kept until the clock was read."""

    def run() -> float:
        kept: list[object] = []
        add = kept.append

        def batch() -> None:
            for _ in range(BATCH):
                add(operation())

        return clock(batch) / BATCH

    return run


def _consuming(prepare: Callable[[], Sequence[Any]], operation: Callable[[Any], object]) -> Callable[[], float]:
    """As `_each`, for an operation that uses up what it gets; the preparation is not counted."""

    def run() -> float:
        items = prepare()
        kept: list[object] = []
        add = kept.append

        def batch() -> None:
            for item in items:
                add(operation(item))

        elapsed = clock(batch) / len(items)
        kept.clear()
        return elapsed

    return run


def _one_process(table: Table, arena: shmx.Arena, source: torch.Tensor) -> list[Contender]:
    placed = arena.empty(source.shape, dtype=source.dtype)
    placed.copy_(source)
    handle = arena.share(source)
    numbers, plain = (7, 4096, 123456), Plain("shmx-0123456789abcdef", 4096, 123456)

    def handles() -> list[shmx.SharedTensor]:
        return [arena.share(source) for _ in range(BATCH)]

    def blobs() -> list[bytes]:
        with shmx.readers(1):
            return [pickle.dumps(one) for one in handles()]

    def discarded(operation: Callable[[], bytes]) -> Callable[[], float]:
        # A block has cells for ten messages: what is pickled here must not stay announced.
        def run() -> float:
            made: list[bytes] = []
            elapsed = clock(lambda: made.append(operation()))
            shmx.discard(made[0])
            return elapsed

        return lambda: median(run() for _ in range(BATCH))

    def announced() -> bytes:
        with shmx.readers(1):
            return pickle.dumps(handle)

    def there_and_back() -> object:
        with shmx.readers(1):
            return pickle.loads(pickle.dumps(handle))

    def empty_context() -> None:
        with shmx.readers(1):
            pass

    operations = {
        "share": _each(lambda: arena.share(source)),
        "share, `empty` tensor": _each(lambda: arena.share(placed)),
        "`with readers(1)`": _each(empty_context),
        "dumps": discarded(lambda: pickle.dumps(handle)),
        "dumps, `with readers(1)`": discarded(announced),
        "loads": _consuming(blobs, pickle.loads),
        "view": _each(handle.view),
        "materialize": _each(handle.materialize),
        "release": _consuming(handles, lambda one: one.release()),
        "dumps + loads": _each(lambda: pickle.loads(pickle.dumps(handle))),
        "dumps + loads, `with readers(1)`": _each(there_and_back),
        "dumps + loads, tuple of three ints": _each(lambda: pickle.loads(pickle.dumps(numbers))),
        "dumps + loads, class of three fields": _each(lambda: pickle.loads(pickle.dumps(plain))),
    }
    return [Contender(table, row, "us", run) for row, run in operations.items()]


# ---- one message, step by step


def _steps(rounds: int) -> Table:
    """The steps of single messages, alternately right after a message and after other data has gone through caches."""
    table = Table("The steps of one message of 4 KiB, one process", "us")
    others = torch.ones(OTHER_DATA // 4)
    source = torch.arange(SMALL // 4, dtype=torch.float32)
    hot, cold = "caches hot", f"after {size_text(OTHER_DATA)} of other data"
    with shmx.Arena(capacity=64 << 20) as arena, ExitStack() as transports:
        messages: list[Callable[[], dict[str, float]]] = [
            lambda: _pickled(arena, source),
            lambda: _as_bytes(arena, source),
            *(_by_transport(transports, name, source) for name in registry.choose(TRANSPORTS)[0]),
        ]
        for turn in range(-STEP_WARM_UP, rounds):
            for message in rotated(messages, turn):
                for column in rotated((hot, cold), turn):
                    # Right after the one of the other column, nothing would be hot.
                    message()
                    if column == cold:
                        others.add_(1)
                    for step, cost in message().items():
                        if turn >= 0:
                            table.add(step, column, cost)
    return table


def _pickled(arena: shmx.Arena, source: torch.Tensor) -> dict[str, float]:
    clocks = [time.perf_counter_ns()]
    tick = clocks.append
    handle = arena.share(source)
    tick(time.perf_counter_ns())
    with shmx.readers(1):
        blob = pickle.dumps(handle)
    tick(time.perf_counter_ns())
    handle.release()
    tick(time.perf_counter_ns())
    loaded = pickle.loads(blob)
    tick(time.perf_counter_ns())
    view = loaded.view()
    tick(time.perf_counter_ns())
    _compare(view, source)
    released = clock(loaded.release)
    steps = ("share", "`with readers(1)`, dumps", "release", "loads", "view")
    costs = ((end - start) / 1e3 for start, end in itertools.pairwise(clocks))
    return {**dict(zip(steps, costs, strict=True)), "release, as consumer": released}


def _as_bytes(arena: shmx.Arena, source: torch.Tensor) -> dict[str, float]:
    handle = arena.share(source)
    start = time.perf_counter_ns()
    blob = handle.to_bytes(readers=1)
    written = time.perf_counter_ns()
    handle.release()
    again = time.perf_counter_ns()
    loaded = shmx.SharedTensor.from_bytes(blob)
    read = time.perf_counter_ns()
    _compare(loaded.view(), source)
    loaded.release()
    return {"`to_bytes(readers=1)`": (written - start) / 1e3, "`from_bytes`": (read - again) / 1e3}


def _by_transport(stack: ExitStack, name: str, source: torch.Tensor) -> Callable[[], dict[str, float]]:
    """The same message through an adapter of `latency`, without its control channel."""
    module = registry.load(name)
    plan = interface.Plan(f"shmx-bench-{os.getpid()}-{name}", 1, (source.nbytes,), 1)
    producer = module.Producer(plan)
    stack.callback(producer.close)
    consumer = module.Consumer(plan, producer.handle(), 0)
    stack.callback(consumer.close)

    def message() -> dict[str, float]:
        start = time.perf_counter_ns()
        (frames,) = producer.put([source])
        put = time.perf_counter_ns()
        (view,) = consumer.open(frames)
        opened = time.perf_counter_ns()
        _compare(view, source)
        del view
        done = clock(consumer.done)
        producer.recycle()
        return {
            f"{name} as in `latency`: put": (put - start) / 1e3,
            f"{name} as in `latency`: open": (opened - put) / 1e3,
            f"{name} as in `latency`: give back": done,
        }

    return message


def _compare(view: torch.Tensor, source: torch.Tensor) -> None:
    if not torch.equal(view, source):
        raise MeasurementError("a view shows other bytes than were shared")


# ---- two processes


class _Consumer:
    """The other process: loads what it is sent, and echoes over ZMQ."""

    def __init__(self, address: str) -> None:
        import zmq

        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.RCVTIMEO, CALL_BOUND)
        self._socket.connect(address)

    def echo(self, times: int) -> None:
        for _ in range(times):
            self._socket.send(self._socket.recv())

    def load(self, blobs: Sequence[bytes], expected: int) -> dict[str, float]:
        handles, views = [], []
        samples: dict[str, list[float]] = {"load": [], "view": [], "load + view": []}
        for blob in blobs:
            start = time.perf_counter_ns()
            handle = pickle.loads(blob)
            loaded = time.perf_counter_ns()
            view = handle.view()
            viewed = time.perf_counter_ns()
            samples["load"].append((loaded - start) / 1e3)
            samples["view"].append((viewed - loaded) / 1e3)
            samples["load + view"].append((viewed - start) / 1e3)
            handles.append(handle)
            views.append(view)
        # Only now: a look at a large tensor leaves nothing else in the caches.
        if any(int(view[::4093].sum()) != expected for view in views):
            raise MeasurementError("a view shows other bytes than were shared")
        del view
        views.clear()
        samples["release"] = [clock(handle.release) for handle in handles]
        return {name: median(values) for name, values in samples.items()}

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


def _two_processes(table: Table, arena: shmx.Arena, sizes: Sequence[int], rounds: int) -> None:
    import zmq

    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        address = f"ipc://{Path(folder) / 'round-trip'}"
        socket.setsockopt(zmq.RCVTIMEO, CALL_BOUND)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        sources = {size: torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes}
        placed = {size: arena.empty(size, dtype=torch.uint8) for size in sizes}
        for size, tensor in placed.items():
            tensor.copy_(sources[size])

        with Worker(_Consumer, address) as consumer:

            def round_trips(keep: bool) -> None:
                def there_and_back() -> None:
                    socket.send(b"x" * 100)
                    socket.recv()

                consumer.send("echo", ROUND_TRIPS + 1)
                # The first finds the other process asleep.
                there_and_back()
                trip = median(clock(there_and_back) for _ in range(ROUND_TRIPS))
                consumer.receive()
                if keep:
                    for size in sizes:
                        table.add("ZMQ ipc round trip", size_text(size), trip)

            def messages(size: int, in_place: bool, keep: bool) -> None:
                column, kind = size_text(size), "`empty` tensor" if in_place else "copied"
                tensor = placed[size] if in_place else sources[size]
                blobs, shares, pickles = [], [], []
                for _ in range(ONE_BLOCK if in_place else BATCH if size <= SMALL else 1):
                    made: list[Any] = []
                    shares.append(clock(lambda made=made: made.append(arena.share(tensor))))  # type: ignore[misc]
                    with shmx.readers(1):
                        pickles.append(clock(lambda made=made: made.append(pickle.dumps(made[0]))))  # type: ignore[misc]
                    made[0].release()
                    blobs.append(made[1])
                times = consumer.call("load", blobs, int(sources[size][::4093].sum()))
                if keep:
                    table.add(f"share, {kind}", column, median(shares))
                    table.add(f"dumps, {kind}", column, median(pickles))
                    for name, value in times.items():
                        table.add(f"{name}, {kind}", column, value)
                    table.add(f"share + load + view, {kind}", column, median(shares) + times["load + view"])

            contenders: list[Callable[[bool], None]] = [round_trips]
            for size in sizes:
                for in_place in (True, False):
                    contenders.append(lambda keep, size=size, in_place=in_place: messages(size, in_place, keep))  # type: ignore[misc]
            for turn in range(-2, rounds):
                for contender in rotated(contenders, turn):
                    contender(turn >= 0)
            consumer.call("close")


def _checks(one: Table, two: Table, small: str, large: str) -> list[Check]:
    cells = {row: columns["us"] for row, columns in one.samples.items()}
    pickled = paired_ratio(cells["dumps + loads"], cells["dumps + loads, tuple of three ints"])
    trip = two.samples["ZMQ ipc round trip"][small]
    shared = paired_ratio(two.samples["share, copied"][small], trip)
    placed = two.samples["share + load + view, `empty` tensor"]
    same = paired_ratio(placed[large], placed[small])
    half = max(paired_ratio(placed[column], trip) for column in (small, large))
    return [
        Check("4: share + load of an `empty` tensor, large / 4 KiB", same, f"<= {SAME}", same <= SAME),
        Check("4: share + load of an `empty` tensor / ZMQ round trip", half, f"< {LOAD_LIMIT}", half < LOAD_LIMIT),
        Check("5: dumps + loads / tuple of three ints", pickled, f"<= {PICKLE_LIMIT}", pickled <= PICKLE_LIMIT),
        Check("5: share of 4 KiB / ZMQ round trip", shared, f"<= {SHARE_LIMIT}", shared <= SHARE_LIMIT),
    ]


def measure(options: Options) -> Report:
    """Measure both parts; raises ``MeasurementError`` if a view showed other bytes than were shared."""
    sizes = (SMALL, QUICK_LARGE if options.quick else LARGE)
    one = Table("One process, a tensor of 4 KiB", "us", baseline="dumps + loads, tuple of three ints")
    two = Table("Two processes", "us", baseline="ZMQ ipc round trip")
    with shmx.Arena(capacity=4 * sizes[-1] + (256 << 20)) as arena:
        source = torch.randint(0, 255, (SMALL,), dtype=torch.uint8)
        handle = arena.share(source)
        if not torch.equal(pickle.loads(pickle.dumps(handle)).view(), source):
            raise MeasurementError("the view shows other bytes than were shared")
        handle.release()
        take_turns(_one_process(one, arena, source), options.rounds_or(100))
        _two_processes(two, arena, sizes, options.rounds_or(60))
    threads = torch.get_num_threads()
    # So that all of the other data goes through the caches of this core.
    torch.set_num_threads(1)
    try:
        steps = _steps(options.rounds_or(1000))
    finally:
        torch.set_num_threads(threads)
    steps.notes = [
        f"Single calls, each followed by one clock reading. Between two messages {size_text(OTHER_DATA)} are read and "
        "written, or nothing. Only transports that are installed. iceoryx2 sends no description of what is in its "
        "message, sharedvector the number of a slot, which has a shape, shmx a handle that says everything."
    ]
    one.notes = [
        f"Batches of {BATCH}, per call; the fastest path of each operation, caches warm. Of `dumps` the median of "
        f"{BATCH} single calls, each with one clock reading.",
    ]
    two.notes = [
        f"Medians of {BATCH} messages in a row, {ONE_BLOCK} of an `empty` tensor, 1 of a large copied one; the "
        "consumer has slept before each batch. A large copy leaves cold caches to what follows. "
        f"Round trip: 100 bytes each way, PAIR sockets, median of {ROUND_TRIPS}.",
    ]
    return Report("small", [one, steps, two], _checks(one, two, *(size_text(size) for size in sizes)))
