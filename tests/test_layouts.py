"""Any strides go in and the same values come out; what lies in the arena already is not copied."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch

import shmx
from shmx import _core
from tests.blocks import block_of, messages
from tests.children import Children


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(np.prod(shape))).reshape(shape)


def complex_numbers(*shape: int) -> torch.Tensor:
    return torch.complex(numbers(*shape), numbers(*shape) + 0.5)


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "0-d": lambda: torch.tensor(3.5),
    "0-d of a slice": lambda: numbers(4)[2],
    "empty": lambda: torch.empty(0),
    "empty in front": lambda: torch.empty(0, 3),
    "empty in the middle": lambda: torch.empty(2, 0, 3),
    "empty at the end": lambda: torch.empty(3, 2, 0),
    "empty twice": lambda: torch.empty(0, 0),
    "empty slice": lambda: numbers(4, 4)[2:2],
    "contiguous": lambda: numbers(3, 4),
    "behind an offset": lambda: numbers(8)[3:],
    "transposed": lambda: numbers(3, 4).t(),
    "permuted": lambda: numbers(2, 3, 4).permute(2, 0, 1),
    "channels last": lambda: numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "every other": lambda: numbers(4, 6)[:, ::2],
    "diagonal": lambda: numbers(5, 5).diagonal(),
    "expanded": lambda: numbers(3).expand(4, 3),
    "expanded 0-d": lambda: torch.tensor(2.5).expand(7),
    "overlapping windows": lambda: numbers(8).unfold(0, 4, 1),
    "size 1 of any stride": lambda: numbers(16).as_strided((4, 1), (1, 99)),
    "64 dimensions": lambda: numbers(2, 3, 2).reshape((2, 3, *[1] * 61, 2)),
    "negative": lambda: torch._neg_view(numbers(3, 4)),
    "conjugate": lambda: complex_numbers(3, 4).conj(),
    "conjugate transpose": lambda: complex_numbers(3, 4).mH,
    "imaginary part of a conjugate": lambda: complex_numbers(3, 4).conj().imag,
    "real part": lambda: complex_numbers(3, 4).real,
    "requires grad": lambda: numbers(3, 4).requires_grad_(),
    "parameter": lambda: torch.nn.Parameter(numbers(3, 4)),
    "not a leaf": lambda: numbers(3, 4).requires_grad_() * 2,
    "part of a numpy array": lambda: torch.from_numpy(np.arange(12.0).reshape(3, 4)[1:, 1:]),
}

Facts = dict[str, object]


def facts_of(tensor: torch.Tensor) -> Facts:
    return {
        "shape": tuple(tensor.shape),
        "dtype": str(tensor.dtype),
        "values": tensor.detach().resolve_conj().resolve_neg().reshape(-1).numpy().tobytes(),
    }


def read_layouts(connection: Connection) -> dict[str, list[Facts]]:
    found = {}
    for name, handle in connection.recv().items():
        view = handle.view()
        assert not (view.requires_grad or view.is_conj() or view.is_neg()), name
        assert view.is_contiguous(), name
        found[name] = [
            facts_of(view),
            facts_of(handle.materialize()),
            facts_of(handle.materialize_into(torch.empty_like(view))),
        ]
    return found


@pytest.fixture(scope="module")
def seen_by_a_spawned_process() -> Iterator[dict[str, list[Facts]]]:
    """What one other process reads of a tensor of each layout."""
    started = Children()
    try:
        child = started.start(read_layouts)
        child.send({name: shmx.share(make()) for name, make in LAYOUTS.items()})
        yield child.result()
    finally:
        started.kill()
        _core.leave_all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_of_any_layout_reach_a_spawned_process(name, seen_by_a_spawned_process):
    assert seen_by_a_spawned_process[name] == [facts_of(LAYOUTS[name]())] * 3


def test_more_than_64_dimensions_are_a_value_error():
    with pytest.raises(ValueError, match="at most 64 dimensions"):
        shmx.share(torch.zeros([1] * 65))


@pytest.mark.parametrize("shape", [(0, 2**50), (2**62, 0)])
def test_an_empty_tensor_may_have_any_other_sizes(shape):
    loaded = pickle.loads(pickle.dumps(shmx.share(torch.empty(shape))))
    assert loaded.shape == shape
    assert loaded.view().numel() == 0


# ---- tensors that live in the arena


def test_share_of_an_empty_tensor_copies_nothing():
    tensor = shmx.empty((3, 4), dtype=torch.int32)
    tensor.copy_(torch.arange(12).reshape(3, 4))
    handle = shmx.share(tensor)
    assert handle.view().data_ptr() == tensor.data_ptr()
    assert shmx.stats()["arena"]["published"] == 1
    # What was written before the share is there, and the very same memory is.
    tensor[1, 1] = 99
    assert pickle.loads(pickle.dumps(handle)).view()[1, 1] == 99


@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t[1:],
        lambda t: t[:, ::3],
        lambda t: t.t(),
        lambda t: t[2, 3],
        lambda t: t.permute(1, 0)[::2, 1:],
        lambda t: t[:1].expand(5, 12),
        lambda t: t.diagonal(),
        lambda t: t.as_strided((2, 2), (5, 7), 3),
        lambda t: t.view(torch.uint8)[:, 4:9],
        lambda t: t.unfold(1, 4, 2),
    ],
)
def test_share_of_a_slice_of_an_empty_tensor_copies_nothing_and_keeps_its_strides(cut):
    whole = shmx.empty((6, 12))
    whole.copy_(numbers(6, 12))
    first = shmx.share(whole)
    part = cut(whole)
    handle = shmx.share(part)
    assert block_of(handle) == block_of(first)
    assert shmx.stats()["arena"]["published"] == 1
    loaded = pickle.loads(pickle.dumps(handle))
    view = loaded.view()
    assert view.data_ptr() == part.data_ptr()
    assert view.dtype == part.dtype
    assert torch.equal(view, part)
    if not part.is_contiguous():
        assert view.stride() == part.stride()
    copied = loaded.materialize()
    assert copied.is_contiguous()
    assert torch.equal(copied, part)
    assert torch.equal(loaded.materialize_into(torch.empty_like(part.contiguous())), part)


def test_the_stride_of_a_dimension_of_size_1_means_nothing():
    part = shmx.empty(16).as_strided((1, 2), (2**60, 2))
    assert pickle.loads(pickle.dumps(shmx.share(part))).view().shape == (1, 2)


def test_share_of_a_conjugate_or_negative_slice_of_an_empty_tensor_stores_its_values():
    whole = shmx.empty(4, dtype=torch.complex64)
    whole.copy_(complex_numbers(4))
    for part in (whole.conj(), torch._neg_view(whole), whole.conj().imag):
        handle = shmx.share(part)
        assert block_of(handle) != block_of(shmx.share(whole))
        assert torch.equal(handle.view(), part.resolve_conj().resolve_neg())


def test_share_of_a_view_copies_nothing_and_is_equal():
    handle = shmx.share(numbers(4, 5))
    again = shmx.share(handle.view())
    part = shmx.share(handle.view()[1:3, ::2])
    assert block_of(again) == block_of(part) == block_of(handle)
    assert shmx.stats()["arena"]["published"] == 1
    assert torch.equal(again.view(), handle.view())
    assert torch.equal(part.view(), numbers(4, 5)[1:3, ::2])
    assert again.view().data_ptr() == handle.view().data_ptr()


def test_share_in_another_arena_copies():
    handle = shmx.share(numbers(4))
    with shmx.Arena(capacity=1 << 20) as other:
        elsewhere = other.share(handle.view())
        assert block_of(elsewhere)[0] == other.name.removeprefix("/")
        assert torch.equal(elsewhere.view(), handle.view())
        elsewhere.release()


def test_an_empty_tensor_keeps_its_block_without_a_handle():
    arena = shmx.Arena(capacity=1 << 20)
    kept = arena.empty((1 << 19,), dtype=torch.uint8)
    kept.fill_(7)
    alias = kept[1:]
    del kept
    gc.collect()
    other = arena.empty((1 << 19,), dtype=torch.uint8)
    other.fill_(9)
    with pytest.raises(shmx.ArenaFullError):
        arena.empty((1 << 19,), dtype=torch.uint8)
    assert torch.all(alias == 7)
    del alias
    gc.collect()
    arena.empty((1 << 19,), dtype=torch.uint8)


@pytest.mark.parametrize(("shape", "expected"), [(3, (3,)), ((), ()), ([2, 3], (2, 3)), (torch.Size([0, 2]), (0, 2))])
def test_empty_takes_the_shapes_that_torch_takes(shape, expected):
    tensor = shmx.empty(shape)
    assert tensor.shape == expected
    assert tensor.dtype == torch.get_default_dtype()
    assert tensor.is_contiguous()


def test_empty_refuses_a_negative_size():
    with pytest.raises(ValueError, match="no negative size: -2"):
        shmx.empty((3, -2))


# ---- more than 2^32 bytes

HUGE = (1 << 32) + 217_055_233
MARKS = (0, 1, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, HUGE - 2, HUGE - 1)


def read_huge(connection: Connection) -> dict[str, object]:
    whole, tail, ends = connection.recv()
    view = whole.view()
    return {
        "shape": view.shape,
        "marks": [int(view[mark]) for mark in MARKS],
        "sparse sum": int(view[:: 1 << 16].sum()),
        "tail": (tail.view().data_ptr() - view.data_ptr(), tail.materialize()[-2:].tolist()),
        "ends": (ends.view().stride(), ends.materialize().tolist()),
    }


def has_room_for_a_huge_tensor() -> bool:
    facts = os.statvfs("/dev/shm")
    with open("/proc/meminfo") as meminfo:
        available = next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemAvailable"))
    return min(facts.f_bavail * facts.f_frsize, available) > 2 * HUGE


@pytest.mark.long
def test_a_tensor_of_more_than_4_gib_crosses_whole(children):
    if not has_room_for_a_huge_tensor():
        pytest.skip("needs 9 GiB of free memory and of /dev/shm")
    source = torch.zeros(HUGE, dtype=torch.uint8)  # pages that are only read take no memory
    for number, mark in enumerate(MARKS, start=1):
        source[mark] = number
    with shmx.Arena(capacity=5 << 30) as arena:
        whole = arena.share(source)
        view = whole.view()
        tail = arena.share(view[-1000:])
        ends = arena.share(view.as_strided((2,), (HUGE - 1,)))
        child = children.start(read_huge)
        child.send((whole, tail, ends))
        assert child.result() == {
            "shape": (HUGE,),
            "marks": list(range(1, len(MARKS) + 1)),
            "sparse sum": int(source[:: 1 << 16].sum()),
            "tail": (HUGE - 1000, [9, 10]),
            "ends": ((HUGE - 1,), [1, 10]),
        }
        del view


# ---- what comes out


def test_a_materialized_tensor_is_the_callers_own():
    handle = shmx.share(numbers(4, 4))
    view = handle.view()
    owned = handle.materialize()
    assert owned.data_ptr() != view.data_ptr()
    owned.fill_(-1)
    assert torch.equal(view, numbers(4, 4))
    assert torch.equal(handle.materialize(), numbers(4, 4))
    handle.release()
    del view
    assert shmx.stats()["arena"]["held_blocks"] == 0
    assert torch.all(owned == -1)


def test_materialize_on_the_cpu_is_the_same_as_without_a_device():
    handle = shmx.share(numbers(3).t())
    for device in ("cpu", torch.device("cpu"), torch.device("cpu", 0)):
        owned = handle.materialize(device)
        assert owned.device.type == "cpu"
        assert torch.equal(owned, numbers(3))
        assert owned.data_ptr() != handle.view().data_ptr()


def strided_destination() -> torch.Tensor:
    return torch.zeros(4, 6)[:, ::2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(4, 3),
        strided_destination,
        lambda: torch.zeros(3, 4).t(),
        lambda: torch._neg_view(torch.zeros(4, 3)),
        lambda: torch.zeros(4, 3).requires_grad_(),
        lambda: shmx.empty((4, 3)),
    ],
    ids=["contiguous", "strided", "transposed", "negative", "requires grad", "in the arena"],
)
def test_materialize_into_writes_the_callers_tensor_of_any_layout(make):
    handle = shmx.share(numbers(4, 3))
    target = make()
    assert handle.materialize_into(target) is target
    assert torch.equal(target, numbers(4, 3))


def test_materialize_into_leaves_what_lies_between_the_strides():
    base = torch.full((4, 6), 7.0)
    shmx.share(numbers(4, 3)).materialize_into(base[:, ::2])
    assert torch.equal(base[:, ::2], numbers(4, 3))
    assert torch.all(base[:, 1::2] == 7)


def test_materialize_into_a_conjugate_writes_the_values_it_shows():
    base = torch.zeros(3, dtype=torch.complex64)
    shmx.share(complex_numbers(3)).materialize_into(base.conj())
    assert torch.equal(base, complex_numbers(3).conj().resolve_conj())


def test_materialize_into_a_strided_handle_goes_both_ways():
    whole = shmx.empty((4, 6))
    whole.copy_(numbers(4, 6))
    handle = shmx.share(whole.t())
    assert torch.equal(handle.materialize_into(torch.zeros(6, 4)), numbers(4, 6).t())
    assert torch.equal(handle.materialize_into(torch.zeros(4, 6).t()), numbers(4, 6).t())


@pytest.mark.parametrize("target", [torch.zeros(3, 4), torch.zeros(4), torch.zeros(4, 3, dtype=torch.float64)])
def test_materialize_into_another_shape_or_dtype_is_a_value_error_that_tells_both(target):
    handle = shmx.share(numbers(4, 3))
    with pytest.raises(ValueError) as caught:
        handle.materialize_into(target)
    for told in (str(tuple(target.shape)).strip("()"), str(target.dtype), "(4, 3) torch.float32"):
        assert told in str(caught.value).replace("[", "(").replace("]", ")")
    assert torch.all(target == 0)


@pytest.mark.parametrize("target", [None, [0.0] * 3, np.zeros(3, dtype=np.float32)])
def test_materialize_into_something_else_is_a_type_error(target):
    with pytest.raises(TypeError, match=r"takes a torch\.Tensor, not"):
        shmx.share(numbers(3)).materialize_into(target)


def test_a_view_and_its_aliases_keep_the_data_after_the_release_of_the_handle():
    """Rule 8."""
    arena = shmx.Arena(capacity=1 << 20)
    handle = arena.share(torch.full((1 << 19,), 7, dtype=torch.uint8))
    alias = handle.view()[5:].reshape(-1)[:100]
    as_numpy = handle.numpy()[-50:]
    handle.release()
    handle.release()
    del handle
    gc.collect()
    fillers = [arena.share(torch.full((1 << 19,), 9, dtype=torch.uint8))]
    for _ in range(2):
        with pytest.raises(shmx.ArenaFullError):
            arena.share(torch.zeros(1 << 19, dtype=torch.uint8))
        assert torch.all(alias == 7)
        assert (as_numpy == 7).all()
        # The last alias is as good as the first.
        alias = alias[::3]
        gc.collect()
    del alias
    gc.collect()
    with pytest.raises(shmx.ArenaFullError):
        arena.share(torch.zeros(1 << 19, dtype=torch.uint8))
    del as_numpy
    gc.collect()
    fillers.append(arena.share(torch.zeros(1 << 19, dtype=torch.uint8)))


def write_to_the_view(connection: Connection) -> None:
    handle = connection.recv()
    shmx.attach(handle)
    view = handle.view()
    connection.send((view.tolist(), handle.materialize().add_(1).tolist()))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    view[0] = 99


def test_a_consumer_with_shmx_readonly_reads_and_a_write_is_a_fault(children, monkeypatch):
    monkeypatch.setenv("SHMX_READONLY", "1")
    child = children.start(write_to_the_view)
    handle = shmx.share(numbers(4))
    child.send(handle)
    assert child.receive() == ([0, 1, 2, 3], [1, 2, 3, 4])
    assert child.join() == -signal.SIGSEGV
    assert torch.equal(handle.view(), numbers(4))


def test_leaving_the_with_block_of_a_handle_releases_it():
    with shmx.share(numbers(3)) as handle:
        assert handle.is_available
        assert handle.error is None
    assert not handle.is_available
    assert isinstance(handle.error, shmx.ReleasedError)


def test_numpy_reads_the_shared_pages():
    handle = shmx.share(numbers(3, 4))
    address = handle.view().data_ptr()
    for array in (handle.numpy(), np.asarray(handle), np.from_dlpack(handle)):
        assert array.shape == (3, 4)
        assert array.dtype == np.float32
        assert array.ctypes.data == address
    assert np.asarray(handle, dtype=np.float64).dtype == np.float64
    assert np.asarray(handle, dtype=np.float64)[2, 3] == 11


def test_numpy_may_ask_for_a_copy():
    handle = shmx.share(numbers(3))
    copied = np.array(handle)
    assert copied.ctypes.data != handle.view().data_ptr()
    assert np.array(handle, copy=False).ctypes.data == handle.view().data_ptr()


def test_dlpack_reads_the_shared_pages():
    handle = shmx.share(numbers(3, 4))
    assert handle.__dlpack_device__() == (1, 0)
    through = torch.from_dlpack(handle)
    assert through.data_ptr() == handle.view().data_ptr()
    handle.release()
    gc.collect()
    assert torch.equal(through, numbers(3, 4))
    assert shmx.stats()["arena"]["held_blocks"] == 1


def test_len_is_the_first_size():
    assert len(shmx.share(torch.zeros(3, 4))) == 3
    assert len(shmx.share(torch.zeros(0, 4))) == 0
    with pytest.raises(TypeError, match="0-d"):
        len(shmx.share(torch.tensor(1.0)))


def test_repr_tells_what_where_and_why_not():
    handle = shmx.share(torch.zeros(3, 4, dtype=torch.bfloat16))
    text = repr(handle)
    assert text.startswith("SharedTensor(shape (3, 4) torch.bfloat16, /shmx-")
    assert shmx.default_arena().name in text
    assert "readers=3" in repr(handle.with_readers(3))
    handle.release()
    assert repr(handle).endswith("ReleasedError)")
    assert handle.shape == (3, 4)
    assert handle.dtype is torch.bfloat16
    assert handle.nbytes == 24
    assert messages() == 0
