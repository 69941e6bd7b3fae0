"""Copies to and from a device: complete, asynchronous, and no block is used again before its copy has ended."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

import shmx
from shmx import _core, device
from tests import fakegpu
from tests.children import Children
from tests.fakegpu import NAME, FakeDriver
from tests.patterns import BLOCK, is_pattern, pattern, press, small_arena

# The name comes with the device, torch knows it by this one before.
FAKE = torch.device("privateuseone", 0)
OTHER = torch.device("privateuseone", 1)


def pinned() -> dict[str, object]:
    return shmx.stats()["pinned"]  # type: ignore[no-any-return]


def locked_arena(blocks: int = 16) -> shmx.Arena:
    """All of its pages are locked."""
    arena = small_arena(blocks)
    press(arena)
    with arena.share(pattern(0)) as handle:
        shmx.attach(handle, pin="require", device=FAKE)
    return arena


def settle() -> None:
    """Wait for all streams, and for the uses that their copies made of blocks."""
    torch.accelerator.synchronize(FAKE)
    torch.accelerator.synchronize(OTHER)
    while _core.pin_report()["copies_in_flight"]:
        _core.poll_copies()


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize(
    "sent",
    [
        torch.arange(24.0).view(2, 3, 4),
        torch.tensor(7, dtype=torch.int16),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.randn(5).to(torch.complex64),
        torch.randn(3, 3).to(torch.bfloat16),
        torch.randn(300_000),
    ],
    ids=["3d", "0d", "empty", "bool", "complex", "bfloat16", "large"],
)
def test_every_tensor_arrives_as_it_was(gpu: FakeDriver, locked: bool, sent: torch.Tensor) -> None:
    with locked_arena(64) if locked else small_arena(64) as arena:
        handle = arena.share(sent)
        if not locked:
            shmx.attach(handle, pin="off")
        arrived = handle.materialize(FAKE)
        assert arrived.device == FAKE and arrived.dtype == sent.dtype and arrived.shape == sent.shape
        assert torch.equal(arrived.cpu(), sent)
        assert arrived.is_contiguous() and not arrived._is_view()
        handle.release()
        settle()


def test_a_strided_slice_arrives_contiguous(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        whole = arena.empty((8, 8), dtype=torch.float32)
        whole.copy_(torch.arange(64.0).view(8, 8))
        handle = arena.share(whole[::2, 1::3])
        arrived = handle.materialize(FAKE)
        assert torch.equal(arrived.cpu(), whole[::2, 1::3])
        handle.release()
        settle()


def test_a_call_returns_while_its_copy_is_pending(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        handle = arena.share(pattern(1))
        with gpu.held():
            arrived = handle.materialize(FAKE)
            assert pinned()["copies_in_flight"] == 1
        assert is_pattern(arrived.cpu(), 1)
        handle.release()
        settle()


def test_a_call_that_blocks_returns_when_its_copy_is_done(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        handle = arena.share(pattern(1))
        handle.materialize(FAKE, non_blocking=False)
        assert pinned()["copies_in_flight"] == 0
        handle.release()


def test_a_block_is_not_used_again_under_its_copy(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        handle = arena.share(pattern(1))
        with gpu.held():
            arrived = handle.materialize(FAKE)
            handle.release()
            assert press(arena) == 15
        assert is_pattern(arrived.cpu(), 1)
        settle()
        assert press(arena) == 16


def test_a_copy_whose_block_is_let_go_too_early_delivers_other_bytes(gpu: FakeDriver) -> None:
    # The control for the test above: the same without the wait for the event.
    with locked_arena() as arena:
        handle = arena.share(pattern(1))
        arrived = torch.empty(BLOCK // 8, dtype=torch.int64, device=FAKE)
        stream = torch.accelerator.current_stream(FAKE)
        with gpu.held():
            copy = _core.DeviceCopy([handle], "cuda", 0, stream.native_handle)
            arrived.view(torch.uint8).copy_(copy.bytes_of(0), non_blocking=True)
            copy.finish()
            handle.release()
            assert press(arena) == 16
        assert not is_pattern(arrived.cpu(), 1)


def test_off_while_a_copy_is_under_way_locks_no_more_and_undoes_nothing(gpu: FakeDriver) -> None:
    with shmx.Arena(capacity=16 * BLOCK, segment_bytes=4 * BLOCK) as arena:
        handle = arena.share(pattern(1))
        shmx.attach(handle, pin="require", device=FAKE)
        locked = pinned()["bytes"]
        with gpu.held():
            arrived = handle.materialize(FAKE)
            shmx.attach(handle, pin="off")
            handle.release()
            assert pinned()["bytes"] == locked
            assert press(arena) == 15
        assert is_pattern(arrived.cpu(), 1)
        settle()
        assert press(arena) == 16
        # Straight from what was locked before, by the driver's own buffers from what has come since.
        handles = [arena.share(pattern(seed)) for seed in range(16)]
        gpu.forget_calls()
        copies = device.materialize_many(handles, FAKE)
        assert all(is_pattern(copy.cpu(), seed) for seed, copy in enumerate(copies))
        _core.settle_pinning()
        assert gpu.count("HostRegister") == 0
        assert pinned()["bytes"] == locked
        assert gpu.count("late copies") > 0 and gpu.count("staged copies") > 0


def test_a_use_ends_without_another_call(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        handle = arena.share(pattern(1))
        with gpu.held():
            handle.materialize(FAKE)
            handle.release()
        while _core.pin_report()["copies_in_flight"]:
            pass  # the watching thread does it
        assert press(arena) == 16


def test_the_current_stream_waits_for_a_copy_on_another_one(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        handle = arena.share(pattern(1))
        stream = torch.Stream(FAKE)
        with gpu.held():
            arrived = handle.materialize(FAKE, stream=stream)
            doubled = torch.empty_like(arrived).copy_(arrived, non_blocking=True)
        assert is_pattern(doubled.cpu(), 1)
        handle.release()
        settle()


def test_threads_that_copy_on_one_stream_come_back_to_their_own(gpu: FakeDriver) -> None:
    stream, own = torch.Stream(FAKE), torch.Stream(FAKE)
    before = torch.accelerator.current_stream(FAKE)

    def copy(handle: shmx.SharedTensor) -> bool:
        torch.accelerator.set_stream(own)
        handle.materialize(FAKE, stream=stream)
        return torch.accelerator.current_stream(FAKE) == own

    with locked_arena() as arena, ThreadPoolExecutor(1) as pool:
        handle = arena.share(pattern(1))
        gpu.hold_calls("StreamIsCapturing")
        try:
            copying = pool.submit(copy, handle)
            while gpu.held_calls() == 0:
                pass
            with stream:
                gpu.hold_calls("")
                assert copying.result()
        finally:
            gpu.hold_calls("")
        assert torch.accelerator.current_stream(FAKE) == before
        handle.release()
        settle()


def test_each_device_gets_its_own_copy(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        handle = arena.share(pattern(1))
        with gpu.held():
            copies = [handle.materialize(where) for where in (FAKE, OTHER)]
            handle.release()
            assert press(arena) == 15
        assert [copy.device for copy in copies] == [FAKE, OTHER]
        assert all(is_pattern(copy.cpu(), 1) for copy in copies)
        settle()


def test_a_copy_for_another_device_makes_no_context_on_the_current_one(
    fake_libraries: tuple[Path, Path], children: Children
) -> None:
    children.start(copy_for_another_device, *map(str, fake_libraries)).result()


def copy_for_another_device(connection: Connection, driver: str, library: str) -> None:
    fakegpu.use(Path(driver), Path(library))
    has_context = torch.get_device_module(NAME).has_context
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        shmx.attach(handle, pin="require", device=OTHER)
        arrived = handle.materialize(OTHER)
        handle.materialize(OTHER, stream=torch.Stream(OTHER), non_blocking=False)
        handle.materialize_into(arrived)
        with arena.share(arrived) as back:
            assert is_pattern(back.view(), 1)
        assert has_context(1) and not has_context(0)
        assert torch.accelerator.current_device_index() == 0
        # The control: torch itself.
        with torch.Stream(OTHER):
            pass
        assert has_context(0)
        handle.release()


def test_a_stream_of_another_device_is_refused(gpu: FakeDriver) -> None:
    with locked_arena() as arena, arena.share(pattern(1)) as handle, pytest.raises(ValueError, match="fakegpu:1"):
        handle.materialize(FAKE, stream=torch.Stream(OTHER))


def test_a_result_that_is_dropped_does_not_end_the_use(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        handle = arena.share(pattern(1))
        with gpu.held():
            handle.materialize(FAKE)
            del handle
            gc.collect()
            assert press(arena) == 15
        settle()


def test_an_exception_behind_a_copy_does_not_end_the_use(gpu: FakeDriver) -> None:
    def fails(handle: shmx.SharedTensor) -> None:
        handle.materialize(FAKE)
        handle.release()
        raise KeyError

    with locked_arena() as arena:
        with gpu.held():
            with pytest.raises(KeyError):
                fails(arena.share(pattern(1)))
            assert press(arena) == 15
        settle()


def test_tensors_that_were_published_together_go_in_one_transfer(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        sent = [torch.arange(count + 1.0) for count in range(32)]
        handles = arena.share_many(sent)
        gpu.forget_calls()
        with gpu.held():
            arrived = device.materialize_many(handles, FAKE)
            for handle in handles:
                handle.release()
            # The watching thread asks about the event as often as it likes.
            calls = [name for name in gpu.log() if name in ("MemcpyHtoDAsync", "EventRecord", "HostRegister")]
            assert calls == ["MemcpyHtoDAsync", "EventRecord"]
            assert pinned()["copies_in_flight"] == 1
            del handle, handles
            assert press(arena) == 15
        assert all(torch.equal(a.cpu(), b) for a, b in zip(arrived, sent, strict=True))
        settle()


def test_neighbours_need_not_be_aligned_to_each_other(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        whole = arena.empty((64,), dtype=torch.int16)
        whole.copy_(torch.arange(64))
        parts = [whole[1:2], whole.view(torch.float32)[1:5], whole.view(torch.float32)[5:9]]
        handles = [arena.share(part) for part in parts]
        arrived = device.materialize_many(handles, FAKE)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(arrived, parts, strict=True))
        del handles
        settle()


def test_tensors_of_different_requests_go_in_one_submission(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        handles = [arena.share(pattern(seed)) for seed in range(4)]
        gpu.forget_calls()
        arrived = device.materialize_many(handles, FAKE)
        assert gpu.count("EventRecord") == 1 and gpu.count("MemcpyHtoDAsync") == 4
        assert all(is_pattern(copy.cpu(), seed) for seed, copy in enumerate(arrived))
        del handles
        settle()


def test_a_stale_handle_in_a_batch_leaves_nothing_in_use(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        good, stale = arena.share(pattern(1)), arena.share(pattern(2))
        stale.revoke()
        with pytest.raises(shmx.ReleasedError):
            device.materialize_many([good, stale], FAKE)
        good.release()
        assert press(arena) == 16


def test_a_given_destination_is_filled_whatever_its_layout(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        sent = torch.arange(12.0).view(3, 4)
        handle = arena.share(sent)
        plain, strided = torch.zeros(3, 4, device=FAKE), torch.zeros(4, 3, device=FAKE).t()
        assert handle.materialize_into(plain) is plain
        handle.materialize_into(strided)
        assert torch.equal(plain.cpu(), sent) and torch.equal(strided.cpu(), sent)
        handle.release()
        settle()


def test_a_device_tensor_is_published_by_one_transfer_into_locked_pages(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        sent = pattern(5).to(FAKE)
        gpu.forget_calls()
        handle = arena.share(sent)
        assert gpu.count("MemcpyDtoHAsync") == 1
        assert is_pattern(handle.view(), 5)


def test_device_tensors_that_are_published_together_are_waited_for_once(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        sent = [pattern(seed, BLOCK // 8).to(FAKE if seed else "cpu") for seed in range(5)]
        gpu.forget_calls()
        handles = arena.share_many(sent)
        assert gpu.count("MemcpyDtoHAsync") == 4 and gpu.log().count("StreamSynchronize") == 1
        assert all(is_pattern(handle.view(), seed) for seed, handle in enumerate(handles))


@pytest.mark.parametrize("locked", [True, False])
def test_a_strided_device_tensor_is_published_contiguous(gpu: FakeDriver, locked: bool) -> None:
    with locked_arena() if locked else small_arena() as arena:
        sent = torch.arange(24.0).view(4, 6).to(FAKE).t()
        handle = arena.share(sent)
        assert torch.equal(handle.view(), sent.cpu()) and handle.view().is_contiguous()
        _core.settle_pinning()


def test_a_copy_is_cut_where_registrations_meet(gpu: FakeDriver) -> None:
    # The driver refuses a copy that spans two; segments grow by steps, which are registered one by one.
    with shmx.Arena(capacity=64 << 20, segment_bytes=64 << 20) as arena:
        small = arena.share(pattern(1))
        shmx.attach(small, pin="require", device=FAKE)
        large = arena.share(pattern(2, 24 << 20))
        shmx.attach(large, pin="require", device=FAKE)
        assert pinned()["chunks"] >= 2
        gpu.forget_calls()
        arrived = large.materialize(FAKE)
        assert gpu.count("MemcpyHtoDAsync") >= 2 and gpu.count("EventRecord") == 1
        assert is_pattern(arrived.cpu(), 2)
        back = arena.share(arrived)
        assert is_pattern(back.view(), 2)
        del small, large, back
        settle()


def test_pages_that_are_not_locked_go_through_the_staging_ring(gpu: FakeDriver) -> None:
    with shmx.Arena(capacity=64 << 20) as arena:
        handle = arena.share(pattern(3, 10 << 20))
        shmx.attach(handle, pin="off")
        gpu.forget_calls()
        arrived = handle.materialize(FAKE)
        handle.release()
        # Three buffers of 4 MiB, of two that are locked once.
        assert gpu.count("MemcpyHtoDAsync") == gpu.count("late copies") == 3
        assert is_pattern(arrived.cpu(), 3)
        gpu.forget_calls()
        second = arena.share(pattern(4, 10 << 20))
        assert is_pattern(second.materialize(FAKE).cpu(), 4)
        assert gpu.count("HostRegister") == 0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 3 * 4096 + 1])
def test_a_ring_copies_all_bytes_with_any_number_of_threads(gpu: FakeDriver, nbytes: int, threads: int) -> None:
    ring = device.StagingRing(FAKE, chunk_bytes=4096, depth=2, threads=threads)
    source = torch.from_numpy(np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8))
    arrived = torch.zeros(nbytes, dtype=torch.uint8, device=FAKE)
    stream = torch.accelerator.current_stream(FAKE)
    for _ in range(3):
        ring.copy(arrived, source, stream)
    assert torch.equal(arrived.cpu(), source)


def test_a_graph_capture_elsewhere_is_not_broken(gpu: FakeDriver) -> None:
    with locked_arena() as arena:
        handle = arena.share(pattern(1))
        captured = torch.Stream(FAKE)
        with gpu.held():
            handle.materialize(FAKE)
            gpu.begin_capture(captured)
            asked = gpu.count("EventQuery")
            while gpu.count("EventQuery") < asked + 3:
                _core.poll_copies()
            assert gpu.end_capture(captured) == 0
            # The control: the same question in the mode that threads have by default.
            gpu.begin_capture(captured)
            torch.accelerator.current_stream(FAKE).query()
            assert gpu.end_capture(captured) == 901
        handle.release()
        settle()


def test_a_copy_is_not_captured_into_a_graph(gpu: FakeDriver) -> None:
    with locked_arena() as arena, arena.share(pattern(1)) as handle:
        captured = torch.Stream(FAKE)
        gpu.begin_capture(captured)
        with pytest.raises(shmx.DeviceError, match="capturing a graph"):
            handle.materialize(FAKE, stream=captured)
        assert gpu.end_capture(captured) == 0


def test_a_graph_does_not_wait_for_a_copy_on_another_stream(gpu: FakeDriver) -> None:
    with locked_arena() as arena, arena.share(pattern(1)) as handle, torch.Stream(FAKE) as captured:
        gpu.begin_capture(captured)
        gpu.forget_calls()
        with pytest.raises(shmx.DeviceError, match="capturing a graph"):
            handle.materialize(FAKE, stream=torch.Stream(FAKE))
        assert gpu.count("MemcpyHtoDAsync") == 0
        assert gpu.end_capture(captured) == 0


@pytest.mark.parametrize("locked", [True, False])
def test_a_device_tensor_is_not_published_by_a_graph(gpu: FakeDriver, locked: bool) -> None:
    with locked_arena() if locked else small_arena() as arena:
        sent = pattern(1).to(FAKE)
        with torch.Stream(FAKE) as captured:
            gpu.begin_capture(captured)
            gpu.forget_calls()
            with pytest.raises(shmx.DeviceError, match="capturing a graph"):
                arena.share(sent)
            assert gpu.count("MemcpyDtoHAsync") == 0
            assert gpu.end_capture(captured) == 0
        assert press(arena) == 16


def test_a_device_without_streams_is_copied_to_by_torch(gpu: FakeDriver) -> None:
    with small_arena() as arena, arena.share(pattern(1)) as handle:
        assert handle.materialize("meta").device.type == "meta"


def test_a_device_without_a_driver_gets_complete_copies(gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(device.DRIVERS, NAME)
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        arrived = handle.materialize(FAKE)
        handle.release()
        assert press(arena) == 16
        assert is_pattern(arrived.cpu(), 1)
        with arena.share(arrived) as back:
            assert is_pattern(back.view(), 1)
    assert pinned()["bytes"] == 0
