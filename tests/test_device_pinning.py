"""Page-locking: once per process and segment, as far as it is reserved, off the path of requests, undone in order."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import shmx
from shmx import _core
from tests import fakegpu
from tests.children import Children
from tests.fakegpu import FakeDriver
from tests.patterns import BLOCK, is_pattern, pattern, press, small_arena

FAKE = torch.device("privateuseone", 0)
PORTABLE, READ_ONLY = 1, 8
OUT_OF_MEMORY = 2
MIB = 1 << 20


def pinned() -> dict[str, object]:
    return shmx.stats()["pinned"]  # type: ignore[no-any-return]


def lock_now(handle: shmx.SharedTensor) -> None:
    shmx.attach(handle, pin="require", device=FAKE)


def test_an_arena_is_registered_once_however_often_it_is_used(gpu: FakeDriver) -> None:
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        for _ in range(3):
            lock_now(handle)
        assert gpu.count("HostRegister") == 1
        assert pinned()["chunks"] == 1
        assert pinned()["bytes"] == arena.stats()["reserved_bytes"]
        assert pinned()["backend"] == "cuda"
        assert float(str(pinned()["milliseconds"])) > 0


def test_only_reserved_pages_are_registered(gpu: FakeDriver) -> None:
    with shmx.Arena(capacity=32 * MIB, segment_bytes=32 * MIB) as arena:
        handle = arena.share(pattern(1))
        lock_now(handle)
        reserved = arena.stats()["reserved_bytes"]
        assert reserved < 32 * MIB
        assert sum(size for _, size, _ in gpu.registrations()) == pinned()["bytes"] == reserved


def test_growth_registers_what_it_adds(gpu: FakeDriver) -> None:
    with shmx.Arena(capacity=32 * MIB, segment_bytes=8 * MIB) as arena:
        handles = [arena.share(pattern(1, MIB))]
        lock_now(handles[0])
        first = gpu.registrations()
        handles += [arena.share(pattern(seed, 3 * MIB)) for seed in range(4)]
        lock_now(handles[0])
        assert set(first) < set(gpu.registrations())
        assert pinned()["bytes"] == arena.stats()["reserved_bytes"]


def test_no_request_registers_anything_after_the_warm_up(gpu: FakeDriver) -> None:
    with small_arena() as arena:
        press(arena)
        handle = arena.share(pattern(0))
        lock_now(handle)
        gpu.forget_calls()
        for seed in range(20):
            sent = arena.share(pattern(seed))
            assert is_pattern(sent.materialize(FAKE).cpu(), seed)
            arena.share(sent.materialize(FAKE)).release()
            sent.release()
        _core.settle_pinning()
        assert gpu.count("HostRegister") == 0
        assert gpu.count("staged copies") == 0
        handle.release()


def test_the_first_use_registers_in_the_background(gpu: FakeDriver) -> None:
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        assert is_pattern(handle.materialize(FAKE).cpu(), 1)
        _core.settle_pinning()
        assert pinned()["bytes"] == arena.stats()["reserved_bytes"]
        handle.release()


def test_trim_unregisters_before_it_unmaps(gpu: FakeDriver) -> None:
    # The driver ends the process otherwise.
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        lock_now(handle)
        handle.release()
        assert arena.trim() == 16 * BLOCK
        assert gpu.registrations() == []
        assert pinned()["bytes"] == 0


def test_a_closed_arena_is_unregistered(gpu: FakeDriver) -> None:
    with small_arena() as arena:
        lock_now(arena.share(pattern(1)))
    assert gpu.registrations() == []


def test_the_driver_ends_a_process_that_unmaps_first(gpu: FakeDriver, children: Children) -> None:
    # The control for the two above.
    child = children.start(unmap_and_unregister, *map(str, fakegpu.build()))
    assert child.join() == -6


def unmap_and_unregister(connection: Connection, driver: str, device: str) -> None:
    gpu = fakegpu.use(Path(driver), Path(device))
    torch.empty(1, device=FAKE)  # makes a context current
    memory = mmap.mmap(-1, 1 << 16)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert gpu.library.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(1 << 16), 1) == 0
    ctypes.CDLL(None).munmap(ctypes.c_void_p(address), ctypes.c_size_t(1 << 16))
    gpu.library.cuMemHostUnregister(ctypes.c_void_p(address))


def test_a_budget_limits_what_is_registered(gpu: FakeDriver) -> None:
    _core.set_pin_limit(3 * BLOCK)
    with small_arena() as arena:
        handles = [arena.share(pattern(seed)) for seed in range(8)]
        with pytest.raises(shmx.DeviceError, match="SHMX_PIN_BYTES"):
            lock_now(handles[0])
        assert pinned()["bytes"] == 3 * BLOCK
        with pytest.warns(RuntimeWarning, match="SHMX_PIN_BYTES"):
            copies = [handle.materialize(FAKE) for handle in handles]
        assert all(is_pattern(copy.cpu(), seed) for seed, copy in enumerate(copies))
        assert gpu.count("late copies") >= 3
        del handles
    with small_arena(3) as arena:
        handle = arena.share(pattern(1))
        lock_now(handle)  # the closed arena has given its part back


def test_off_registers_nothing(gpu: FakeDriver) -> None:
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        shmx.attach(handle, pin="off")
        assert is_pattern(handle.materialize(FAKE).cpu(), 1)
        _core.settle_pinning()
        assert gpu.count("HostRegister") == 0
        lock_now(handle)
        assert gpu.count("HostRegister") == 1


def test_pin_takes_three_words(gpu: FakeDriver) -> None:
    with small_arena() as arena, arena.share(pattern(1)) as handle, pytest.raises(ValueError, match="maybe"):
        shmx.attach(handle, pin="maybe")  # type: ignore[arg-type]


def test_required_locking_says_why_it_failed(gpu: FakeDriver) -> None:
    gpu.fail("HostRegister", code=OUT_OF_MEMORY)
    with (
        small_arena() as arena,
        arena.share(pattern(1)) as handle,
        pytest.raises(
            shmx.DeviceError, match=r"cuMemHostRegister_v2 of /shmx-\w+\.1: OUT_OF_MEMORY \(2\); .*SHMX_PIN_BYTES"
        ),
    ):
        lock_now(handle)


def test_locking_for_no_named_device_is_for_the_current_one(gpu: FakeDriver) -> None:
    with small_arena() as arena, arena.share(pattern(1)) as handle, torch.accelerator.device_index(1):
        gpu.break_device(0)
        shmx.attach(handle, pin="require")
        gpu.recover()
        assert pinned()["bytes"] == arena.stats()["reserved_bytes"]


def test_locking_that_is_not_required_warns_once_and_goes_on(gpu: FakeDriver) -> None:
    gpu.fail("HostRegister", code=1)
    with small_arena() as arena, arena.share(pattern(1)) as handle:
        with pytest.warns(RuntimeWarning, match="INVALID_VALUE"):
            shmx.attach(handle, device=FAKE)
        shmx.attach(handle, device=FAKE)
        assert is_pattern(handle.materialize(FAKE).cpu(), 1)


def overlap(gpu: FakeDriver, handle: shmx.SharedTensor, nbytes: int) -> tuple[int, Callable[[], int]]:
    """Registered by somebody else in this process: its address, and how they undo it."""
    torch.empty(1, device=FAKE)  # makes a context current
    address = handle.view().data_ptr()
    assert gpu.library.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 1) == 0
    return address, lambda: gpu.library.cuMemHostUnregister(ctypes.c_void_p(address))  # type: ignore[no-any-return]


def test_another_registration_is_used_and_not_undone(gpu: FakeDriver) -> None:
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        nbytes = arena.stats()["reserved_bytes"]
        address, undo = overlap(gpu, handle, nbytes)
        registrations = pinned()["registrations"]
        lock_now(handle)
        assert pinned()["foreign_bytes"] == pinned()["bytes"] == nbytes
        assert pinned()["registrations"] == registrations
        gpu.forget_calls()
        assert is_pattern(handle.materialize(FAKE).cpu(), 1)
        assert gpu.count("late copies") == 1
        handle.release()
        while _core.pin_report()["copies_in_flight"]:
            _core.poll_copies()
        arena_end = gpu.registrations()
        assert [start for start, _, _ in arena_end] == [address]
        assert undo() == 0
    assert gpu.count("HostUnregister") == 1


def test_another_registration_of_a_part_is_not_used(gpu: FakeDriver) -> None:
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        _, undo = overlap(gpu, handle, BLOCK // 2)
        with pytest.raises(shmx.DeviceError, match="712"):
            lock_now(handle)
        assert pinned()["bytes"] == 0
        assert undo() == 0


def test_memory_that_cannot_be_unregistered_stays_mapped(fake_libraries: tuple[Path, Path], children: Children) -> None:
    children.start(fail_to_unregister, *map(str, fake_libraries)).result()


def fail_to_unregister(connection: Connection, driver: str, device: str) -> None:
    gpu = fakegpu.use(Path(driver), Path(device))
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        lock_now(handle)
        address = handle.view().data_ptr()
        gpu.fail("HostUnregister", code=1)
        handle.release()
        arena.trim()
        with open("/proc/self/maps") as maps:
            ranges = [line.split()[0].split("-") for line in maps]
        assert any(int(start, 16) <= address < int(end, 16) for start, end in ranges)
        assert pinned()["quarantined_bytes"] == 16 * BLOCK
        assert "HostUnregister" in str(pinned()["reason"])
    torch.empty(1, device=FAKE)  # makes a context current
    assert gpu.library.cuMemHostUnregister(ctypes.c_void_p(address)) == 0


def test_a_reader_registers_for_reading(gpu: FakeDriver, children: Children) -> None:
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        child = children.start(register_for_reading, *map(str, fakegpu.build()), handle.with_readers(1))
        assert child.result() == PORTABLE | READ_ONLY
        handle.release()


def register_for_reading(connection: Connection, driver: str, device: str, handle: shmx.SharedTensor) -> int:
    _core.set_read_only(True)
    gpu = fakegpu.use(Path(driver), Path(device))
    lock_now(handle)
    assert is_pattern(handle.materialize(FAKE).cpu(), 1)
    [(_, _, flags)] = gpu.registrations()
    return flags


def test_a_forked_child_calls_no_driver(gpu: FakeDriver) -> None:
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        lock_now(handle)
        with gpu.held():
            arrived = handle.materialize(FAKE)
            child = os.fork()
            if child == 0:
                # What it inherited it reads, releases and unmaps.
                same = is_pattern(handle.view(), 1)
                handle.release()
                _core.leave_all()
                os._exit(0 if same and gpu.count("after fork") == 0 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert is_pattern(arrived.cpu(), 1)
        handle.release()


def test_an_import_opens_no_driver() -> None:
    program = "import shmx, os; print('libcuda' in open('/proc/self/maps').read(), shmx.stats()['pinned']['backend'])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "none"]


def test_the_module_is_linked_with_no_driver() -> None:
    assert _core.__file__ is not None
    listing = subprocess.run(["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in listing
    assert not any(word in listing.lower() for word in ("cuda", "hip", "torch"))


@pytest.mark.parametrize(
    ("path", "why"), [("/nowhere/libcuda.so.1", "no driver /nowhere"), ("libc.so.6", "has no cuInit")]
)
def test_without_a_driver_it_says_so_and_copies_all_the_same(
    gpu: FakeDriver, path: str, why: str, children: Children
) -> None:
    assert why in children.start(use_no_driver, *map(str, fakegpu.build()), path).result()


def use_no_driver(connection: Connection, driver: str, device: str, path: str) -> str:
    fakegpu.use(Path(driver), Path(device))
    torch.empty(1, device=FAKE)  # the device has its driver
    os.environ["SHMX_CUDA_DRIVER"] = path
    with small_arena() as arena, arena.share(pattern(1)) as handle:
        assert is_pattern(handle.materialize(FAKE).cpu(), 1)
        _core.settle_pinning()
        assert shmx.stats()["pinned"]["backend"] == "none"
        with pytest.raises(shmx.DeviceError) as error:
            lock_now(handle)
        _core.take_pin_warning()
    return str(error.value)


def test_a_driver_that_does_not_start_is_told(gpu: FakeDriver, children: Children) -> None:
    text = children.start(use_driver_that_does_not_start, *map(str, fakegpu.build())).result()
    assert "cuInit of" in text and "(100)" in text and "CUDA_VISIBLE_DEVICES" in text


def use_driver_that_does_not_start(connection: Connection, driver: str, device: str) -> str:
    gpu = fakegpu.use(Path(driver), Path(device))
    torch.empty(1, device=FAKE)
    gpu.fail("Init", code=100)
    with small_arena() as arena, arena.share(pattern(1)) as handle:
        with pytest.raises(shmx.DeviceError) as error:
            lock_now(handle)
        assert is_pattern(handle.materialize(FAKE).cpu(), 1)
    return str(error.value)
