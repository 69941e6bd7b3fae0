"""Does a message cost page faults, system calls or a second copy once everything is warm?

A producer and a consumer process exchange messages of several tensors; the kernel's counters are read around the
calls of shmx alone, and strace, where it is installed, lists the system calls between two markers. Then views of one
tensor in 1, 2 and 4 consumers: how much memory the host spends on it.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

import shmx

from ..options import Options
from ..process_tree import MeasurementError
from ..report import Check, Report, Table, size_text
from ..worker import Worker

__all__ = ["measure"]

MODES = ("view", "materialize")
# The tensors of a message: many small ones and some that are copied without the GIL, by either kind of store.
MESSAGE = (4 << 10,) * 8 + (1 << 20,) * 4 + (8 << 20,) * 2
QUICK_MESSAGE = (4 << 10,) * 4 + (1 << 20,) * 2
WARM_UP = 12
TRACED_MESSAGES = 20
VIEWED, QUICK_VIEWED = 128 << 20, 8 << 20
CONSUMERS = (1, 2, 4)
ONE_COPY = 1.05
STRACE_BOUND = 20.0
# The background reserves a step in a few milliseconds.
SETTLING = 0.2
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, (1 << 64) - 1

FAULTS, WAITS, PREEMPTIONS = "page faults", "waits", "preemptions"


class _Counters:
    """What this thread costs the kernel between two readings, by name of the step."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, float]] = {}

    @contextmanager
    def around(self, step: str) -> Iterator[None]:
        before = resource.getrusage(resource.RUSAGE_THREAD)
        yield
        after = resource.getrusage(resource.RUSAGE_THREAD)
        self.steps[step] = {
            FAULTS: after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt,
            WAITS: after.ru_nvcsw - before.ru_nvcsw,
            PREEMPTIONS: after.ru_nivcsw - before.ru_nivcsw,
        }


@contextmanager
def _marked(name: str | None) -> Iterator[None]:
    # A system call that does nothing, with a name that can be found in a trace.
    if name is not None:
        os.access(f"/marker/{name}/begin", os.F_OK)
    yield
    if name is not None:
        os.access(f"/marker/{name}/end", os.F_OK)


class _Traceable:
    def allow_tracing(self) -> int:
        """Let a process that is no ancestor trace this one, where Yama would forbid it; the process id."""
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(PR_SET_PTRACER_ANY), 0, 0, 0)
        return os.getpid()


class _Producer(_Traceable):
    def __init__(self, sizes: Sequence[int]) -> None:
        self._arena = shmx.Arena(capacity=64 * sum(sizes) + (64 << 20))
        self._sources = [torch.randint(0, 1 << 40, (size // 8,)) for size in sizes]

    def publish(self, turn: int, mark: str | None) -> tuple[bytes, list[int], dict[str, dict[str, float]]]:
        for source in self._sources:
            source[0] = turn
        sums = [int(source.sum()) for source in self._sources]
        counters = _Counters()
        with _marked(mark and f"producer/{mark}"), counters.around("share + dumps + release"):
            handles = [self._arena.share(source) for source in self._sources]
            with shmx.readers(1):
                blob = pickle.dumps(handles)
            for handle in handles:
                handle.release()
        return blob, sums, counters.steps

    def hold(self, size: int, consumers: int) -> tuple[bytes, int]:
        """Publish one tensor and keep nothing of it but the block."""
        source = torch.randint(0, 1 << 40, (size // 8,))
        self._held = self._arena.share(source)
        with shmx.readers(consumers):
            return pickle.dumps(self._held), int(source.sum())

    def ahead(self) -> int:
        """Bytes that the arena has taken ahead of need, once it takes no more."""
        reserved = -1
        while (stats := self._arena.stats())["reserved_bytes"] != reserved:
            reserved = stats["reserved_bytes"]
            time.sleep(SETTLING)
        return int(reserved - stats["bytes_in_use"])

    def memory(self) -> dict[str, int]:
        return _memory()


class _Consumer(_Traceable):
    def consume(
        self, blob: bytes, sums: Sequence[int], mode: str, mark: str | None
    ) -> tuple[bool, dict[str, dict[str, float]]]:
        counters = _Counters()
        with _marked(mark and f"consumer/{mark}"), counters.around(f"loads + {mode}"):
            handles = pickle.loads(blob)
            tensors = [handle.view() if mode == "view" else handle.materialize() for handle in handles]
        with counters.around("first full read"):
            found = [int(tensor.sum()) for tensor in tensors]
        with _marked(mark and f"consumer/{mark}"), counters.around("release"):
            tensors.clear()
            for handle in handles:
                handle.release()
        return found == list(sums), counters.steps

    def view(self, blob: bytes) -> int:
        self._view = pickle.loads(blob).view()
        return int(self._view.sum())

    def memory(self) -> dict[str, int]:
        return _memory()


def _memory() -> dict[str, int]:
    """This process's share of the memory it maps, in bytes: a page that n processes map counts 1/n in each."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Pss_Shmem", "Pss_Anon"):
            found[name] = int(rest.split()[0]) << 10
    return found


def _exchange(
    producer: Worker, consumer: Worker, mode: str, rounds: int, *, warm_up: int = WARM_UP, marked: bool = False
) -> Iterator[tuple[int, dict[str, dict[str, float]]]]:
    """Send messages; of each that is not warm-up the pickle's bytes and what the steps have cost."""
    for turn in range(-warm_up, rounds):
        mark = mode if marked and turn >= 0 else None
        blob, sums, costs = producer.call("publish", turn, mark)
        right, more = consumer.call("consume", blob, sums, mode, mark)
        if not right:
            raise MeasurementError("a consumer read other bytes than were shared")
        if turn >= 0:
            yield len(blob), {**costs, **more}


def _counted(producer: Worker, consumer: Worker, sizes: Sequence[int], rounds: int) -> tuple[list[Table], Table]:
    wire = Table("Bytes of a message on the control channel", "bytes")
    tables = []
    for mode in MODES:
        table = Table(f"A message of {len(sizes)} tensors, {size_text(sum(sizes))}; {mode}", "count")
        for sent, steps in _exchange(producer, consumer, mode, rounds):
            wire.add("pickle", mode, sent)
            for step, costs in steps.items():
                for column, number in costs.items():
                    table.add(step, column, number)
        tables.append(table)
    return tables, wire


# ---- system calls


@contextmanager
def _strace(program: str, workers: Sequence[Worker], folder: Path) -> Iterator[None]:
    """Trace the processes, one file per thread; raises ``OSError`` if they cannot be attached to."""
    pids = [worker.call("allow_tracing") for worker in workers]
    attach = [argument for pid in pids for argument in ("-p", str(pid))]
    tracer = subprocess.Popen(
        [program, "-ff", "-qq", "-o", str(folder / "trace"), *attach], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + STRACE_BOUND
        while not all(_is_traced(pid) for pid in pids):
            if tracer.poll() is not None or time.monotonic() > deadline:
                tracer.kill()
                message = tracer.communicate()[1].strip()
                raise OSError((message or "strace attached to nothing").splitlines()[-1])
            time.sleep(0.01)
        yield
        # It lets the processes go and ends.
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=STRACE_BOUND)
    finally:
        tracer.kill()
        tracer.communicate()


def _is_traced(pid: int) -> bool:
    return "\nTracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def _between_markers(folder: Path) -> dict[tuple[str, str], Counter[str]]:
    """System calls by side and mode, as `strace -ff` has written them, one file per thread."""
    calls: dict[tuple[str, str], Counter[str]] = {
        (side, mode): Counter() for side in ("producer", "consumer") for mode in MODES
    }
    for trace in folder.iterdir():
        place = None
        for line in trace.read_text(errors="replace").splitlines():
            if (marker := re.search(r'"/marker/(\w+)/(\w+)/(begin|end)"', line)) is not None:
                place = (marker[1], marker[2]) if marker[3] == "begin" else None
            elif place is not None and (call := re.match(r"(\w+)\(", line)) is not None:
                calls[place][call[1]] += 1
    return calls


def _system_calls(
    producer: Worker, consumer: Worker, messages: int, warm_up: int = WARM_UP
) -> tuple[Table | None, str]:
    strace = shutil.which("strace")
    if strace is None:
        return None, "System calls were not counted: strace is not installed."
    table = Table("System calls between markers, in all of a process's calls of shmx", "per message")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _strace(strace, [producer, consumer], Path(folder)):
                for mode in MODES:
                    for _ in _exchange(producer, consumer, mode, messages, warm_up=warm_up, marked=True):
                        pass
        except OSError as error:
            return None, f"System calls were not counted: {error}."
        seen = _between_markers(Path(folder))
    listed = []
    for (side, mode), calls in seen.items():
        # The two getrusage of each counted step are the question's own, and show that the markers were found.
        if calls.pop("getrusage", 0) == 0:
            return None, "System calls were not counted: the trace shows no markers."
        table.add(side, mode, sum(calls.values()) / messages)
        if calls:
            listed.append(f"{side}, {mode}: {', '.join(f'{name} {n}' for name, n in calls.most_common())}")
    return table, "System calls seen: " + ("; ".join(listed) + f" in {messages} messages." if listed else "none.")


# ---- memory


def _one_copy(size: int) -> tuple[Table, list[float]]:
    table = Table(
        f"Memory of the host for one tensor of {size_text(size)} that every consumer views and reads", "bytes"
    )
    ratios = []
    for count in CONSUMERS:
        with ExitStack() as processes:
            producer = processes.enter_context(Worker(_Producer, [size // 16]))
            consumers = [processes.enter_context(Worker(_Consumer)) for _ in range(count)]
            before = _summed([producer, *consumers])
            blob, expected = producer.call("hold", size, count)
            for consumer in consumers:
                consumer.send("view", blob)
            if any([consumer.receive() != expected for consumer in consumers]):
                raise MeasurementError("a consumer read other bytes than were shared")
            ahead = producer.call("ahead")
            after = _summed([producer, *consumers])
            column = f"{count} consumer{'s' * (count > 1)}"
            shared = after["Pss_Shmem"] - before["Pss_Shmem"]
            table.add("shared", column, shared)
            table.add("of these, free: taken ahead of need", column, ahead)
            table.add("private, all processes", column, after["Pss_Anon"] - before["Pss_Anon"])
            ratios.append((shared - ahead) / size)
    return table, ratios


def _summed(workers: Sequence[Worker]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for worker in workers:
        total.update(worker.call("memory"))
    return dict(total)


def _checks(view: Table, calls: Table | None, ratios: Sequence[float]) -> list[Check]:
    faults = sum(sum(cells[FAULTS]) for cells in view.samples.values())
    checks = [Check("3: page faults of all messages and steps, view mode", faults, "0", faults == 0)]
    if calls is not None:
        for side in calls.samples:
            number = calls.median(side, "view")
            checks.append(Check(f"3: system calls of the {side}, view mode", number, "0", number == 0))
    checks.append(
        Check(
            "6: shared memory of viewing consumers that is not free / bytes",
            max(ratios),
            f"<= {ONE_COPY}",
            max(ratios) <= ONE_COPY,
        )
    )
    return checks


def measure(options: Options) -> Report:
    """Measure all parts; raises ``MeasurementError`` if a consumer read other bytes than were shared."""
    sizes = QUICK_MESSAGE if options.quick else MESSAGE
    with Worker(_Producer, sizes, method="spawn") as producer, Worker(_Consumer, method="spawn") as consumer:
        tables, wire = _counted(producer, consumer, sizes, options.rounds_or(60))
        calls, calls_note = _system_calls(producer, consumer, 3 if options.quick else TRACED_MESSAGES)
    memory, ratios = _one_copy(QUICK_VIEWED if options.quick else VIEWED)
    for table in tables:
        total = sum(sum(cells[FAULTS]) for cells in table.samples.values())
        table.notes = [
            f"Per message, after {WARM_UP} messages; page faults of all messages together: {total:.0f}. Counters of "
            "the calling thread; waits are voluntary context switches.",
        ]
    memory.notes = [
        "Sums of Pss over the producer and all consumers, beside before the tensor was shared; the producer keeps the "
        "handle, its own source is gone. What was taken ahead of need is free for the next tensors. Private memory "
        "includes what a first sum() leaves in each process.",
    ]
    extra = [] if calls is None else [calls]
    return Report("hot_path", [*tables, *extra, wire, memory], _checks(tables[0], calls, ratios), [calls_note])
