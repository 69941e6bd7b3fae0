"""Every failure of the driver, at every call: the result is right or the error is clear, and no page stays locked."""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import shmx
from shmx import _core, device
from tests import fakegpu
from tests.children import Children
from tests.fakegpu import FakeDriver
from tests.forkserver import preloaded
from tests.patterns import is_pattern, pattern, press, small_arena

FAKE = torch.device("privateuseone", 0)
# Of each call that is made again and again while a copy is pending, the first few.
MOST = 6
CALLS = (
    "CtxPushCurrent",
    "CtxPopCurrent",
    "ThreadExchangeStreamCaptureMode",
    "HostRegister",
    "HostUnregister",
    "StreamIsCapturing",
    "MemAlloc",
    "MemcpyHtoDAsync",
    "MemcpyDtoHAsync",
    "StreamSynchronize",
    "EventCreate",
    "EventRecord",
    "EventQuery",
    "EventDestroy",
)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with preloaded("tests.test_device_failures"):
        yield


def whole_life() -> None:
    """Everything that is done with a device, each result compared."""
    with small_arena() as arena:
        handles = [arena.share(pattern(seed)) for seed in range(3)]
        shmx.attach(handles[0], device=FAKE)
        for seed, copy in enumerate(device.materialize_many(handles, FAKE)):
            assert is_pattern(copy.cpu(), seed)
        back = arena.share(handles[1].materialize(FAKE, stream=torch.Stream(FAKE)))
        assert is_pattern(back.view(), 1)
        into = torch.empty(8192, dtype=torch.int64, device=FAKE)
        assert is_pattern(back.materialize_into(into).cpu(), 1)
        del handles, back
        press(arena)


def clean_up(gpu: FakeDriver, before: set[int]) -> int:
    """End everything; answers how many bytes stay registered that were not before."""
    gpu.recover()
    gc.collect()
    torch.accelerator.synchronize(FAKE)
    _core.leave_all()
    _core.take_pin_warning()
    left = [entry for entry in gpu.registrations() if entry[0] not in before]
    for start, _, _ in left:
        assert gpu.library.cuMemHostUnregister(ctypes.c_void_p(start)) == 0
    return sum(size for _, size, _ in left)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_once_leaves_a_right_result_or_a_clear_error(
    fake_libraries: tuple[Path, Path], children: Children, name: str
) -> None:
    # In a process of its own: what cannot be unregistered stays mapped.
    children.start(fail_once, *map(str, fake_libraries), name, method="forkserver").result()


def fail_once(connection: Connection, driver: str, library: str, name: str) -> None:
    gpu = fakegpu.use(Path(driver), Path(library))
    before = {start for start, _, _ in gpu.registrations()}
    whole_life()
    clean_up(gpu, before)
    gpu.forget_calls()
    whole_life()
    clean_up(gpu, before)
    calls = gpu.count(name)
    assert calls > 0
    for index in range(min(calls, MOST)):
        quarantined = _core.pin_report()["quarantined_bytes"]
        device._told.clear()
        gpu.fail(name, index, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                whole_life()
            except shmx.DeviceError as error:
                assert str(error)
            except RuntimeError as error:
                # Of torch itself, outside shmx: its allocation, its copy back to the CPU.
                assert "fake driver" in str(error)
        left = clean_up(gpu, before)
        assert left == _core.pin_report()["quarantined_bytes"] - quarantined, (name, index)


@pytest.mark.parametrize("name", ["MemcpyHtoDAsync", "EventCreate", "EventRecord", "StreamSynchronize", "EventQuery"])
def test_a_device_that_breaks_keeps_the_blocks_it_may_be_reading(
    gpu: FakeDriver, children: Children, name: str
) -> None:
    children.start(break_device, *map(str, fakegpu.build()), name).result()


def break_device(connection: Connection, driver: str, library: str, name: str) -> None:
    gpu = fakegpu.use(Path(driver), Path(library))
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        shmx.attach(handle, pin="require", device=FAKE)
        gpu.hold_streams()
        if name == "EventQuery":
            # The copy is in the stream when the device breaks.
            handle.materialize(FAKE)
            gpu.fail(name, 0, 700, sticky=True)
        else:
            gpu.fail(name, 0, 700, sticky=True)
            with pytest.raises(shmx.DeviceError, match=r"restart this process|fakegpu:0"):
                if name == "StreamSynchronize":
                    handle.materialize(FAKE, non_blocking=False)
                else:
                    handle.materialize(FAKE)
        handle.release()
        gc.collect()
        assert press(arena) == 15
        report = _core.pin_report()
        assert report["copies_lost"] + report["copies_in_flight"] == 1
        gpu.release_streams()


def test_a_device_that_breaks_while_it_writes_keeps_the_block(gpu: FakeDriver, children: Children) -> None:
    children.start(break_device_that_writes, *map(str, fakegpu.build())).result()


def break_device_that_writes(connection: Connection, driver: str, library: str) -> None:
    gpu = fakegpu.use(Path(driver), Path(library))
    with small_arena() as arena:
        press(arena)
        with arena.share(pattern(1)) as handle:
            shmx.attach(handle, pin="require", device=FAKE)
        sent = pattern(2).to(FAKE)
        gpu.hold_streams()
        gpu.fail("StreamSynchronize", 0, 700, sticky=True)
        with pytest.raises(shmx.DeviceError, match="may write to it yet"):
            arena.share(sent)
        gc.collect()
        assert press(arena) == 15
        gpu.release_streams()
