"""The questions that shmx answers alone: each runs, fills its tables, and would notice wrong bytes."""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import pytest
import torch

pytest.importorskip("zmq")

from shmx.bench.options import Options
from shmx.bench.process_tree import MeasurementError
from shmx.bench.questions import bounds, hot_path, scaling
from shmx.bench.report import Table
from shmx.bench.worker import Worker, WorkerError

QUESTIONS = ("bounds", "small", "hot_path", "scaling", "cold", "cuda")


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_is_answered(name: str) -> None:
    """A report exists only if all contents were right: `measure` raises otherwise."""
    module: ModuleType = importlib.import_module(f"shmx.bench.questions.{name}")
    assert module.__doc__ is not None and module.__doc__.splitlines()[0].endswith("?")
    report = module.measure(Options(rounds=1, quick=True))
    assert report.question == name
    assert report.checks
    for table in report.tables:
        cells = [samples for columns in table.samples.values() for samples in columns.values()]
        assert cells, f"nothing in {table.title}"
        assert all(math.isfinite(sample) for samples in cells for sample in samples)
        assert table.title in report.text()


def test_wrong_bytes_are_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds._core, "copy", lambda destination, source, size, how: None)
    with pytest.raises(MeasurementError, match="wrong bytes"):
        bounds.measure(Options(rounds=1, quick=True))


@pytest.mark.skipif(hot_path.shutil.which("strace") is None, reason="strace is not installed")
def test_system_calls_of_a_growing_arena_are_seen() -> None:
    """The zeros of the hot path are zeros of a counter that counts."""
    with Worker(hot_path._Producer, (1 << 20,)) as producer, Worker(hot_path._Consumer) as consumer:
        table, note = hot_path._system_calls(producer, consumer, messages=2, warm_up=0)
    if table is None:
        pytest.skip(note)  # tracing is forbidden here
    assert table.median("producer", "view") > 0
    assert "fallocate" in note


def test_slope_is_the_exponent() -> None:
    table = Table("growth", "us")
    for size in (1, 10, 100, 1000):
        table.add("constant", str(size), 5.0)
        table.add("square root", str(size), 3.0 * size**0.5)
    assert scaling.slope(table, "constant", (1, 10, 100, 1000)) == pytest.approx(0)
    assert scaling.slope(table, "square root", (1, 10, 100, 1000)) == pytest.approx(0.5)


class Moody:
    def answer(self) -> int:
        return torch.get_num_threads()

    def fail(self) -> None:
        raise KeyError("no such thing")

    def die(self) -> None:
        import os

        os._exit(3)


def test_worker_answers_and_passes_failures_on() -> None:
    with Worker(Moody) as worker:
        assert worker.call("answer") == 1
        with pytest.raises(WorkerError, match="no such thing"):
            worker.call("fail")
        assert worker.call("answer") == 1
    assert worker.process.exitcode == 0


def test_worker_that_dies_is_told() -> None:
    with pytest.raises(WorkerError, match="died"), Worker(Moody) as worker:
        worker.call("die")
    assert worker.process.exitcode == 3
