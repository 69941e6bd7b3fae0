"""Which class an error has, which errno, and that every message names the object and a remedy."""

from __future__ import annotations

import builtins
import contextlib
import copy
import errno
import fcntl
import gc
import os
import pickle
import resource
import struct
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
import torch

import shmx
import shmx.errors
from shmx import _core
from tests.handle_bytes import parse
from tests.peer import control_file

BASES = {
    "ArenaFullError": OSError,
    "SegmentLostError": FileNotFoundError,
    "StaleHandleError": LookupError,
    "ForeignHostError": FileNotFoundError,
    "ReleasedError": ValueError,
    "InvalidHandleError": ValueError,
    "TooManyPeersError": OSError,
    "DeviceError": RuntimeError,
    "SystemCallError": OSError,
}


@pytest.mark.parametrize("name", BASES)
def test_an_error_is_one_of_shmx_and_one_of_python(name):
    error = getattr(shmx, name)
    assert error is getattr(shmx.errors, name)
    assert issubclass(error, shmx.ShmxError)
    assert issubclass(error, BASES[name])


def test_the_classes_are_these_and_no_others():
    classes = {name for name in shmx.errors.__all__ if isinstance(getattr(shmx.errors, name), type)}
    assert classes == {*BASES, "ShmxError"}
    assert shmx.ShmxError.__bases__ == (Exception,)
    assert issubclass(shmx.ForeignHostError, shmx.SegmentLostError)
    for name in BASES:
        others = {base for base in set(BASES.values()) if issubclass(getattr(shmx, name), base)}
        assert others == ({OSError, FileNotFoundError} if BASES[name] is FileNotFoundError else {BASES[name]})


def test_an_error_pickles():
    """Workers send them to their parents."""
    with pytest.raises(shmx.ArenaFullError) as caught:
        shmx.empty(1 << 50)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is shmx.ArenaFullError
    assert (str(again), again.errno) == (str(caught.value), errno.ENOSPC)


# ---- each error, provoked: (class, errno, what its message names)

Provoked = tuple[BaseException, list[str]]


def of(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def arena_full() -> Provoked:
    arena = shmx.Arena(capacity=1 << 20)
    kept = arena.empty((1 << 20,), dtype=torch.uint8)
    error = of(lambda: arena.share(torch.zeros(10)))
    del kept
    return error, [arena.name, "no room for 256 B", "used up; release handles and views, or raise it (SHMX_CAPACITY)"]


def segment_lost() -> Provoked:
    arena = shmx.Arena(capacity=1 << 20)
    with arena.share(torch.zeros(10)) as handle, shmx.readers(0):
        blob = pickle.dumps(handle)
    arena.close()
    return of(pickle.loads(blob).view), [arena.name, "is gone", "send the tensor again"]


def lost_to_attach() -> Provoked:
    arena = shmx.Arena(capacity=1 << 20)
    with arena.share(torch.zeros(10)) as handle, shmx.readers(0):
        blob = pickle.dumps(handle)
    arena.close()
    return of(lambda: shmx.attach(pickle.loads(blob))), [arena.name, "is gone", "send the tensor again"]


def stale() -> Provoked:
    arena = shmx.Arena(capacity=4096)
    with arena.share(torch.zeros(1024)) as handle, shmx.readers(0):
        blob = pickle.dumps(handle)
    arena.share(torch.zeros(1024))
    return of(pickle.loads(blob).materialize), [
        "block 0 of",
        arena.name,
        "readers(n)",
        "enlarge SHMX_CAPACITY",
        "the request was aborted",
    ]


def revoked() -> Provoked:
    handle = shmx.share(torch.zeros(10))
    twin = copy.copy(handle)
    handle.revoke()
    return of(pickle.loads(pickle.dumps(twin)).view), [
        shmx.default_arena().name,
        "stale or revoked",
        "send the tensor again",
    ]


def foreign_host() -> Provoked:
    fields = parse(shmx.share(torch.zeros(10)).with_readers(0).to_bytes())
    fields.host ^= 1
    handle = shmx.SharedTensor.from_bytes(fields.to_bytes())
    return of(handle.view), [fields.arena_name, "another host", "--ipc=host"]


def handle_released() -> Provoked:
    handle = shmx.share(torch.zeros(10))
    handle.release()
    return of(handle.view), [shmx.default_arena().name, "was released", "take views and copies before release()"]


def handle_released_before_pickling() -> Provoked:
    handle = shmx.share(torch.zeros(10))
    handle.release()
    loaded = pickle.loads(pickle.dumps(handle))
    return of(loaded.view), [shmx.default_arena().name, "released before it was pickled", "pickle it first"]


def arena_closed() -> Provoked:
    arena = shmx.Arena(capacity=1 << 20)
    arena.close()
    return of(lambda: arena.share(torch.zeros(10))), [arena.name, "is closed", "make another one"]


def invalid_handle() -> Provoked:
    return of(lambda: shmx.SharedTensor("U1gB")), ["not a valid shmx handle", "made by something other than shmx"]


def another_format_version() -> Provoked:
    state = bytearray(shmx.share(torch.zeros(10)).with_readers(0).to_bytes())
    state[2] = 2
    return of(lambda: shmx.SharedTensor.from_bytes(bytes(state))), ["version is not 1", "one shmx version everywhere"]


PROVOKED = {
    arena_full: (shmx.ArenaFullError, errno.ENOSPC),
    segment_lost: (shmx.SegmentLostError, errno.ENOENT),
    lost_to_attach: (shmx.SegmentLostError, errno.ENOENT),
    stale: (shmx.StaleHandleError, None),
    revoked: (shmx.StaleHandleError, None),
    foreign_host: (shmx.ForeignHostError, errno.ENOENT),
    handle_released: (shmx.ReleasedError, None),
    handle_released_before_pickling: (shmx.ReleasedError, None),
    arena_closed: (shmx.ReleasedError, None),
    invalid_handle: (shmx.InvalidHandleError, None),
    another_format_version: (shmx.InvalidHandleError, None),
}


@pytest.mark.parametrize("provoke", PROVOKED, ids=lambda provoke: provoke.__name__)
def test_a_message_names_what_happened_to_which_arena_and_the_remedy(provoke):
    expected, number = PROVOKED[provoke]
    error, told = provoke()
    assert type(error) is expected
    assert getattr(error, "errno", None) == number
    for words in told:
        assert words in str(error)
    # The exception keeps nothing alive that the test would be blamed for.
    del error
    gc.collect()


# ---- errors of the system


@contextlib.contextmanager
def all_peer_slots_taken(arena: shmx.Arena) -> Iterator[None]:
    """Lock the byte of every peer slot, as 63 processes would."""
    with open(control_file(arena.name), "r+b", buffering=0) as control:
        request = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 1, _core.MAX_PEERS - 1, 0)
        fcntl.fcntl(control, fcntl.F_OFD_SETLK, request)
        yield


def attach_and_load(connection: Connection) -> list[tuple[str, int | None, str]]:
    handle = connection.recv()
    found = [handle.error, of(handle.view), of(lambda: shmx.attach(handle)), pickle.loads(pickle.dumps(handle)).error]
    return [(type(error).__name__, getattr(error, "errno", None), str(error)) for error in found]


def test_an_arena_without_a_free_peer_slot_is_too_many_peers(children):
    arena = shmx.default_arena()
    handle = shmx.share(torch.zeros(10))
    with all_peer_slots_taken(arena):
        child = children.start(attach_and_load)
        child.send(handle.with_readers(0))  # announced, it would wait for a load to come
        *first, carried = child.result()
    for name, number, message in first:
        assert (name, number) == ("TooManyPeersError", errno.EUSERS)
        for words in (arena.name, "64 processes", "let consumers that are done exit"):
            assert words in message
    assert carried[0] == "TooManyPeersError"
    assert arena.name in carried[2]


@pytest.mark.parametrize(("reason", "number"), [(1, errno.ENOSPC), (7, errno.EUSERS)])
def test_a_carried_error_keeps_its_errno(reason, number):
    fields = parse(shmx.share(torch.zeros(10)).with_readers(0).to_bytes())
    fields.reason = reason
    assert shmx.SharedTensor.from_bytes(fields.to_bytes()).error.errno == number


def without_descriptors(connection: Connection) -> list[tuple[str, int | None, str]]:
    handle = connection.recv()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        found = [of(shmx.Arena), of(handle.view), of(lambda: shmx.share(torch.zeros(10)))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # Nothing was spoilt by it.
    assert torch.equal(handle.view(), torch.arange(10))
    shmx.share(torch.zeros(10))
    return [(type(error).__name__, getattr(error, "errno", None), str(error)) for error in found]


def test_a_process_without_descriptors_is_a_system_call_error_with_the_remedy(children):
    handle = shmx.share(torch.arange(10))
    child = children.start(without_descriptors)
    child.send(handle)
    for name, number, message in child.result():
        assert (name, number) == ("SystemCallError", errno.EMFILE)
        assert "/shmx-" in message or "/dev/shm" in message
        assert "raise `ulimit -n`" in message


# ---- what cannot be shared


@pytest.mark.parametrize("value", [None, 5, [1, 2], "tensor", b"bytes", object(), torch.float32, torch.Tensor])
def test_what_is_no_tensor_is_a_type_error_that_names_its_type(value):
    for refuse in (lambda: shmx.share(value), lambda: shmx.share(value, key="a")):
        with pytest.raises(TypeError) as caught:
            refuse()
        assert f"share takes a torch.Tensor, not <class '{type(value).__module__}" in str(caught.value).replace(
            "<class 'int'>", "<class 'builtins'>"
        ).replace(f"<class '{type(value).__name__}'>", f"<class '{type(value).__module__}'>")
        assert "torch.from_numpy or torch.as_tensor" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "torch.sparse_csr"),
        (lambda: torch.empty(3, device="meta"), "meta device"),
    ],
    ids=["coo", "csr", "meta"],
)
def test_a_tensor_that_is_not_dense_is_a_type_error_that_says_what_it_is(make, told):
    with pytest.raises(TypeError) as caught:
        shmx.share(make())
    assert told in str(caught.value)
    assert "to_dense()" in str(caught.value)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor_is_a_type_error_that_says_what_to_do():
    quantized = torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"cannot store dtype torch\.qint8; .*dequantize"):
        shmx.share(quantized)
    assert torch.equal(shmx.share(quantized.dequantize()).view(), torch.ones(3))


class Wrapper(torch.Tensor):
    """A tensor subclass without memory of its own, as DTensor is."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def freed() -> torch.Tensor:
    """A tensor whose storage was given back, as FSDP does with parameters."""
    tensor = torch.ones(300)
    tensor.untyped_storage().resize_(0)
    return tensor


def faked() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(300)


WITHOUT_MEMORY = {
    "freed": freed,
    "fake": faked,
    "wrapper": lambda: Wrapper(torch.ones(300)),
    "zero": lambda: torch._efficientzerotensor((300,)),
}


def share_without_memory(connection: Connection, names: list[str]) -> str:
    handle = shmx.share(torch.ones(300))
    for name in names:
        for use in (shmx.share, handle.materialize_into):
            with pytest.raises(TypeError):
                use(WITHOUT_MEMORY[name]())
    return "type errors"


def test_a_tensor_without_memory_behind_it_is_a_type_error_and_no_crash(children):
    assert children.start(share_without_memory, list(WITHOUT_MEMORY)).result() == "type errors"


# ---- objects that are half made, or outlive their process's part in an arena


def show_half_made(connection: Connection) -> list[str]:
    arena = shmx.Arena.__new__(shmx.Arena)
    handle = shmx.SharedTensor.__new__(shmx.SharedTensor)
    uses = [
        lambda: repr(arena), lambda: arena.closed, arena.stats, arena.close, lambda: repr(handle), handle.view,
        lambda: handle.shape, handle.to_bytes, handle.release,
    ]  # fmt: skip
    found = []
    for use in uses:
        try:
            use()
        except Exception as error:
            found.append(type(error).__name__)
    return found


def test_an_object_whose_creation_failed_raises_and_does_not_crash(children):
    """A debugger, pytest and error reporters show ``self`` of the frame that raised."""
    assert set(children.start(show_half_made).result()) <= {"TypeError", "ValueError", "ReleasedError"}


def use_half_made_readers(connection: Connection) -> str:
    with pytest.raises(TypeError), shmx.readers.__new__(shmx.readers):
        pass
    return "a type error"


def test_readers_that_were_never_made_raise_and_do_not_crash(children):
    assert children.start(use_half_made_readers).result() == "a type error"


def test_a_handle_of_an_arena_that_the_process_has_left_says_so():
    handle = shmx.share(torch.zeros(10))
    _core.leave_all()
    assert not handle.is_available
    for use in (handle.view, handle.materialize, copy.copy(handle).view):
        with pytest.raises(shmx.ReleasedError, match="is not used by this process any more"):
            use()
    assert not pickle.loads(pickle.dumps(handle)).is_available
    handle.release()


def test_a_handle_of_an_arena_that_the_process_has_left_has_an_error():
    handle = shmx.share(torch.zeros(10))
    _core.leave_all()
    assert isinstance(handle.error, shmx.ReleasedError)
    assert repr(handle).endswith("ReleasedError)")


def test_no_error_shadows_a_builtin():
    assert not set(shmx.__all__) & set(dir(builtins))
