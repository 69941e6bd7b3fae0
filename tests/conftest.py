"""What every test stands on: nothing may be left behind, and children are bounded."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shmx.device
from shmx import _core
from tests import fakegpu
from tests.children import Children

SHM = Path("/dev/shm")


def segment_names() -> set[str]:
    return {entry.name for entry in SHM.iterdir() if entry.name.startswith("shmx-")}


def orphan_names() -> set[str]:
    """Names of arenas without a living owner. Those of programs beside the tests have one."""
    alive = {report["name"].removeprefix("/") for report in _core.reap() if report["outcome"] == "owner alive"}
    return {name for name in segment_names() if name.partition(".")[0] not in alive}


def open_descriptors() -> dict[int, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the descriptor that listed the directory
    return found


def pytest_configure() -> None:
    # A shell starts what runs behind it (`pytest &`, nohup) with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    # What is imported by now is no garbage. A collection after each test would take 0.1 s to find that out.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    return report


_passed = pytest.StashKey[bool]()


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a segment, a child or a descriptor. The default arena ends with each test."""
    names = segment_names()
    descriptors = open_descriptors()
    yield
    gc.collect()
    _core.leave_all()
    _core.clear_pool()
    left = {
        "children": multiprocessing.active_children(),
        "descriptors": sorted(
            target for fd, target in open_descriptors().items() if descriptors.get(fd) != target and "shmx-" in target
        ),
        "segments": sorted(orphan_names() - names),
    }
    if left["segments"]:
        # They would fail every later test too.
        _core.reap(force=True)
    if request.node.stash.get(_passed, False):
        assert not any(left.values()), f"left behind: { {what: which for what, which in left.items() if which} }"


@pytest.fixture(scope="session")
def fake_libraries() -> tuple[Path, Path]:
    """The fake driver and the fake torch device, compiled."""
    try:
        return fakegpu.build()
    except fakegpu.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def gpu(fake_libraries: tuple[Path, Path]) -> Iterator[fakegpu.FakeDriver]:
    """``fakegpu`` as a torch device of this process, in good order; no page is locked when the test has ended."""
    driver = fakegpu.use(*fake_libraries)
    before = {start for start, _, _ in driver.registrations()}
    driver.forget_calls()
    yield driver
    driver.recover()
    driver.release_streams()
    torch.accelerator.synchronize()
    gc.collect()
    _core.leave_all()
    _core.set_pin_limit(2**63)
    _core.take_pin_warning()
    shmx.device._forget_rings()
    assert {start for start, _, _ in driver.registrations()} <= before, "pages stayed locked"


@pytest.fixture
def children() -> Iterator[Children]:
    """Start processes; whatever still runs at the end of the test is killed."""
    started = Children()
    yield started
    started.kill()


@pytest.fixture
def segments() -> Iterator[object]:
    """The names in /dev/shm that have appeared since the test began, as a function."""
    before = segment_names()
    yield lambda: segment_names() - before


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("SHMX_BACKEND", "shm") != "shm":
        for item in items:
            if "needs_names" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs segments with names; unset SHMX_BACKEND"))
    if os.environ.get("SHMX_LONG") == "1":
        return
    for item in items:
        if "long" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="minutes; set SHMX_LONG=1"))
