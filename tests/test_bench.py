"""The peer comparison: every transport that can run here does, contents are checked, failures have names."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from shmx.bench import compare, malloc_policy, plots, process_tree, runner
from shmx.bench.exchange import Exchange, TransportError, serve
from shmx.bench.options import Options
from shmx.bench.payloads import Reference, Sources, parse
from shmx.bench.process_tree import MeasurementError, Place
from shmx.bench.report import Report, Table, machine, read, write
from shmx.bench.transports import registry
from shmx.bench.transports.partial_import import import_only
from shmx.bench.turns import rotated

SHM = Path("/dev/shm")


@pytest.fixture(autouse=True)
def no_name_of_any_transport_left() -> Any:
    before = set(os.listdir(SHM))
    yield
    # Names of other programs come and go.
    left = {name for name in os.listdir(SHM) if "shmx-bench" in name or name.startswith(("torch_", "sgl_shm_"))}
    assert left - before == set()


# ---- questions ----


def test_runner_finds_questions_and_their_first_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--list"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"latency", "throughput", "broadcast"} <= set(lines)
    assert lines["latency"] == "How long until consumers can read, or own, what a producer has put?"


def test_latency_of_every_transport_that_is_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latency.json"
    arguments = ["latency", "--quick", "--sizes", "4KiB,2x256KiB", "--consumers", "2", "--json", str(file)]
    assert runner.main([*arguments, "--plots", str(tmp_path)]) == 0
    (report,) = read(file)
    installed, missing = registry.choose(())
    assert {"shmx", "segment", "torch_fs", "torch_fd", "pickle", "pickle5"} <= set(installed)
    assert [note for note in report.notes if "round" in note or "Error" in note] == []
    view, own = report.tables
    assert set(installed) <= set(view.samples)
    for table in (view, own):
        for row in table.samples:
            assert all(len(table.samples[row][size]) == 3 for size in ("4KiB", "2x256KiB"))
    assert set(missing) <= set(report.notes)
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert "fastest peer" in capsys.readouterr().out


def test_throughput_keeps_messages_in_flight(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    assert runner.main(["throughput", "--quick", "--sizes", "64KiB", "--consumers", "2", "--json", str(file)]) == 0
    (report,) = read(file)
    assert all(rate > 0 for rate in report.tables[0].samples["shmx"]["64KiB"])


def test_broadcast_counts_what_the_segments_lose(tmp_path: Path) -> None:
    file = tmp_path / "broadcast.json"
    assert runner.main(["broadcast", "--quick", "--consumers", "2", "--json", str(file)]) == 0
    (report,) = read(file)
    times, losses = report.tables
    assert all(losses.median(row, "2x64KiB") == 0 for row in ("shmx", "shmx_view", "inline"))
    assert set(times.samples) >= {"shmx", "shmx_view", "segment", "inline"}


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["latency", "--rounds", "0"], ["latency", "--consumers", "x"], ["--modes", "guess"]]
)
def test_wrong_arguments_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        runner.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize("arguments", [["--transports", "pigeon"], ["--sizes", "3 apples"]])
def test_unknown_transport_and_size_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["latency", *arguments]) == 2
    assert repr(arguments[1]) in capsys.readouterr().err


def test_transport_without_its_package_is_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PACKAGES, "iceoryx2", "no_such_package")
    chosen, missing = registry.choose(["shmx", "iceoryx2"])
    assert chosen == ["shmx"]
    assert missing == ["iceoryx2: left out, the package no_such_package is not installed."]


# ---- contents ----


def test_reference_tells_stale_short_and_changed_messages() -> None:
    payload = parse("2x4KiB")
    sources, reference = Sources(payload), Reference(payload)
    tensors = [tensor.clone() for tensor in sources.stamped(7)]
    assert reference.fault(tensors, 7, everything=True) is None
    reference.check_ends(tensors, 7)
    assert "not the bytes of this message" in str(reference.fault(tensors, 8, everything=False))
    with pytest.raises(AssertionError, match="not the bytes of this message"):
        reference.check_ends(tensors, 8)
    assert reference.fault(tensors[:1], 7, everything=False) == "1 tensors instead of 2"
    # Between two stamps.
    tensors[1].view(torch.int32)[1] += 1
    assert reference.fault(tensors, 7, everything=False) is None
    assert reference.fault(tensors, 7, everything=True) == "message 7, tensor 1: wrong bytes"


def test_sources_take_turns() -> None:
    sources = Sources(parse("4KiB"))
    assert len({sources.stamped(serial)[0].data_ptr() for serial in range(6)}) == 3


def test_mm32_is_the_request_of_the_demonstration() -> None:
    payload = parse("mm32")
    assert len(payload.sizes) == 32
    assert 175 < payload.nbytes / (1 << 20) < 190
    assert all(size % (1176 * 4) == 0 for size in payload.sizes)


def test_every_transport_begins_once_and_follows_different_ones() -> None:
    rounds = ["".join(rotated("abcd", turn)) for turn in range(8)]
    assert [order[0] for order in rounds] == [*"abcd", *"abcd"]
    assert all(sorted(order) == [*"abcd"] for order in rounds)
    followers = {order[i : i + 2] for order in rounds for i in range(3)}
    assert {"ab", "ad"} <= followers


# ---- failures ----


def wrong_bytes(place: Place) -> str:
    with Exchange(place) as exchange:
        payload = parse("4KiB")
        exchange.set_up("pickle", payload)
        tensors = Sources(payload).stamped(1)
        exchange.turn("pickle", "view", 1, tensors, everything=True)
        try:
            exchange.turn("pickle", "view", 2, tensors, everything=False)
        except TransportError as error:
            return str(error)
    return ""


def other_tensors(place: Place) -> str:
    with Exchange(place) as exchange:
        payload = parse("4KiB")
        exchange.set_up("segment", payload)
        try:
            exchange.turn("segment", "view", 1, [torch.zeros(4)], everything=False)
        except TransportError as error:
            return str(error)
    return ""


def failing_stream(place: Place) -> list[str]:
    errors = []
    with Exchange(place) as exchange:
        payload = parse("4KiB")
        tensors = Sources(payload).stamped(1)
        for name in ("pickle", "shmx"):
            exchange.set_up(name, payload, in_flight=4)
        for name, serial in (("pickle", 2), ("shmx", 1)):
            try:
                exchange.stream(name, [(1, tensors), (serial, tensors)], 20, in_flight=4)
            except TransportError as error:
                errors.append(str(error))
    return errors


def test_failed_stream_leaves_the_channel_usable() -> None:
    errors = process_tree.run(failing_stream, serve, 2, bound_s=60)
    assert errors == ["pickle: AssertionError: message 2, tensor 0: not the bytes of this message"]


def test_wrong_bytes_end_a_transport_by_name() -> None:
    message = process_tree.run(wrong_bytes, serve, 2, bound_s=60)
    assert message == "pickle: AssertionError: message 2, tensor 0: not the bytes of this message"
    assert "not the bytes" in process_tree.run(other_tensors, serve, 1, bound_s=60)


def wait_for_ever(place: Place) -> None:
    time.sleep(600)


def die(place: Place) -> None:
    os._exit(3)


def fail(place: Place) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize(
    ("consumer", "bound_s", "message"),
    [(die, 60, "consumer 0 died"), (fail, 60, "on purpose"), (wait_for_ever, 1, "no result within 1 s")],
)
def test_tree_ends_with_whoever_fails_first(consumer: Any, bound_s: float, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        process_tree.run(wait_for_ever, consumer, 1, bound_s=bound_s)


def test_malloc_policy_must_be_known() -> None:
    with pytest.raises(ValueError, match="settled"):
        malloc_policy.apply("hope")


# ---- partial imports ----


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package whose module wants much that is not there."""
    deep = tmp_path / "big_engine" / "inner"
    deep.mkdir(parents=True)
    for folder in (tmp_path / "big_engine", deep):
        (folder / "__init__.py").write_text("raise ImportError('must not run')")
    (deep / "wanted.py").write_text(
        "import json, not_installed.at_all as missing\n"
        "from big_engine.other import Base, decorate, VALUE\n"
        "@decorate\n"
        "def twice(x): return 2 * x\n"
        "class Real(Base[int]): pass\n"
        "value = VALUE\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("big_engine")]:
        del sys.modules[name]


def test_only_the_named_modules_run(engine: None) -> None:
    (wanted,) = import_only("big_engine", ["big_engine.inner.wanted"], {"big_engine.other": {"VALUE": 5}})
    assert wanted.twice(4) == 8
    assert wanted.value == 5
    assert wanted.json is json
    assert "not_installed" not in sys.modules
    assert not any("partial_import" in type(finder).__module__ for finder in sys.meta_path)


def test_package_that_is_not_installed_is_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_engine"):
        import_only("no_such_engine", ["no_such_engine.a"])


# ---- compare ----


def file_of(path: Path, unit: str = "us", **cells: list[float]) -> str:
    table = Table("title", unit, {row: {"4KiB": samples} for row, samples in cells.items()})
    write(path, [Report("latency", [table])], machine())
    return str(path)


STEADY = [10.0, 10.2, 9.9, 10.1, 10.0, 9.8, 10.3, 10.1]


@pytest.mark.parametrize(
    ("factor", "unit", "status", "verdict"),
    [
        (1.0, "us", 0, "noise"),
        (1.05, "us", 0, "noise"),
        (1.5, "us", 1, "worse"),
        (0.5, "us", 0, "better"),
        (1.5, "1/s", 0, "better"),
        (0.5, "GB/s", 1, "worse"),
    ],
)
def test_compare_says_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, unit: str, status: int, verdict: str
) -> None:
    before = file_of(tmp_path / "a.json", unit, shmx=STEADY, other=STEADY)
    after = file_of(tmp_path / "b.json", unit, shmx=[factor * sample for sample in STEADY], other=STEADY)
    assert compare.main([before, after]) == status
    out = capsys.readouterr().out
    assert out.startswith(verdict)
    assert "rows that are not judged: 1.00x" in out


def test_compare_calls_wide_samples_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file_of(tmp_path / "a.json", shmx=[1.0, 5.0, 9.0, 2.0, 30.0, 4.0])
    after = file_of(tmp_path / "b.json", shmx=[1.5, 7.0, 12.0, 2.0, 28.0, 5.0])
    assert compare.main([before, after]) == 0
    assert capsys.readouterr().out.startswith("noise")


def test_compare_does_not_judge_few_samples_nor_other_rows(tmp_path: Path) -> None:
    before = file_of(tmp_path / "a.json", shmx=[1.0, 1.0], other=STEADY)
    after = file_of(tmp_path / "b.json", shmx=[9.0, 9.0], other=[9 * sample for sample in STEADY])
    assert compare.main([before, after]) == 0
    assert compare.main([before, after, "--rows", "all"]) == 1


def test_compare_needs_common_cells_and_readable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file_of(tmp_path / "a.json", other=STEADY)
    assert compare.main([before, before]) == 2
    assert compare.main([before, str(tmp_path / "absent.json")]) == 2
    (tmp_path / "wrong.json").write_text("{}")
    assert compare.main([before, str(tmp_path / "wrong.json")]) == 2
    assert "no cell of shmx" in capsys.readouterr().err


def test_tables_without_sizes_are_not_drawn(tmp_path: Path) -> None:
    table = Table("title", "us", {"shmx": {"first": [1.0], "second": [2.0]}})
    assert plots.draw(Report("question", [table]), tmp_path) == []


@pytest.mark.parametrize(("columns", "meaning"), [(("64 B", "4 KiB"), "bytes"), (("1", "10", "100"), "number")])
def test_tables_over_sizes_and_numbers_are_drawn(tmp_path: Path, columns: tuple[str, ...], meaning: str) -> None:
    table = Table("Growth of it", "us", {row: {column: [1.0, 2.0] for column in columns} for row in ("share", "load")})
    (file,) = plots.draw(Report("scaling", [table]), tmp_path)
    assert file == tmp_path / "scaling-growth-of-it.png"
    assert set(plots._places(table)[0]) == set(columns)
    assert plots._places(table)[1] == meaning


def test_options_choose_rounds() -> None:
    assert [
        Options().rounds_or(30),
        Options(quick=True).rounds_or(30),
        Options(rounds=7, quick=True).rounds_or(30),
    ] == [
        30,
        3,
        7,
    ]
