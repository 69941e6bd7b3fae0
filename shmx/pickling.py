"""Pickles and msgpack messages whose large tensors leave as handles: any graph that can be pickled, without a walk.

A pickle of ours is a small one around that of the graph. The outer one holds the handles, all of one message, and the
bytes of the inner one. In those, each large tensor is a "next buffer" of protocol 5, whose place is taken by whatever
the unpickler is given there. So ``pickle.loads`` need not know of any of this.
"""

from __future__ import annotations

import contextlib
import copyreg
import ctypes
import io
import pickle
import sys
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from shmx import _core
from shmx.arena import Arena, default_arena, discard_blob
from shmx.array import SharedArray, storable_array
from shmx.config import default_min_bytes
from shmx.errors import InvalidHandleError
from shmx.hooks import publish, storable

if TYPE_CHECKING:
    from typing import Protocol

    from shmx._core import SharedTensor

    class _Writer(Protocol):
        def write(self, data: bytes, /) -> object: ...

    class _Reader(Protocol):
        def read(self, length: int, /) -> bytes: ...
        def readline(self) -> bytes: ...


__all__ = ["Pickler", "Unpickler", "dec_hook", "dumps", "enc_hook", "ext_hook", "loads"]


def dumps(
    obj: Any,
    *,
    readers: int | None = None,
    min_bytes: int | None = None,
    arena: Arena | None = None,
    timeout: float | None = None,
) -> bytes:
    """Pickle an object whose large tensors and arrays leave as handles, wherever they are in it.

    Takes anything that :mod:`pickle` takes. All tensors share one block and one message. Tensors over the same memory
    are published once and share their memory again when they are loaded. The object is not changed.

    Parameters
    ----------
    obj
        Anything that can be pickled.
    readers
        How often the result will be loaded, with the handles that are in the object; without it, that of
        ``with shmx.readers(n)``, or one load. What :meth:`SharedTensor.with_readers` has bound to a handle goes first.
    min_bytes
        Memory of fewer bytes travels in the pickle. Default 64 KiB, or ``SHMX_MIN_BYTES``.
    arena, timeout
        As for :func:`wrap`.

    Returns
    -------
    bytes
        For :func:`loads`, or ``pickle.loads`` where shmx is installed. :func:`discard` takes it back. Large buffers of
        any object that pickles them by protocol 5 leave as handles, too. While the arena is full everything is inline,
        counted and warned of as for :func:`wrap`. Tensors that are not on the CPU are pickled as torch does.

    Raises
    ------
    Exception
        Whatever pickling the object raises. Then nothing stays published.
    """
    file = io.BytesIO()
    Pickler(file, readers=readers, min_bytes=min_bytes, arena=arena, timeout=timeout).dump(obj)
    return file.getvalue()


def loads(
    data: bytes | bytearray | memoryview, *, device: torch.device | str | int | None = None, lazy: bool = False
) -> Any:
    """Load what :func:`dumps` returned, or any other pickle.

    Parameters
    ----------
    data
        The pickle. As with :mod:`pickle`: only from where you trust.
    device
        Where to put the tensors that came as handles; by default the CPU.
    lazy
        Leave handles in the places of tensors and arrays, for :func:`unwrap`; then these do not raise because data is
        gone. A tensor that was a part of some larger memory, a ``torch.nn.Parameter`` and any other buffer are copied
        nevertheless; the last two raise.

    Returns
    -------
    object
        Its tensors are the caller's own; handles that were in the object are handles.

    Raises
    ------
    StaleHandleError, SegmentLostError, ForeignHostError, InvalidHandleError, TooManyPeersError
        Why data is gone. (``pickle.loads`` does not raise it, but leaves the handle in the place of its tensor.)
    """
    return Unpickler(io.BytesIO(data), device=device, lazy=lazy).load()


# What is in an envelope: the published tensors, the handles of the object, which of them is which, the inner pickle.
Apart = tuple[Sequence[Any], Sequence[Any], "_Order", bytes]


def take_apart(obj: Any, min_bytes: int | None) -> Apart:
    """What :func:`dumps` puts into one pickle, for those who send handles by another way than bytes."""
    pickler = Pickler(io.BytesIO(), min_bytes=min_bytes)
    try:
        return pickler._apart(obj)
    finally:
        pickler._forget(None)


def put_together(apart: Apart) -> Any:
    """The object again; raises what :func:`loads` raises."""
    return Unpickler(io.BytesIO())._restore(*apart)


class Pickler(pickle.Pickler):
    """A ``pickle.Pickler`` whose large tensors and arrays leave as handles; see :func:`dumps`.

    For files and pipes, and for subclasses with a ``reducer_override`` of their own. Each :meth:`dump` is a pickle of
    its own, and a message of its own.

    Parameters
    ----------
    file
        Written to, once for each pickle.
    readers, min_bytes, arena, timeout
        As for :func:`dumps`.
    """

    def __init__(
        self,
        file: _Writer,
        *,
        readers: int | None = None,
        min_bytes: int | None = None,
        arena: Arena | None = None,
        timeout: float | None = None,
    ) -> None:
        """Write nothing yet."""
        self._inner = io.BytesIO()
        super().__init__(self._inner, 5, buffer_callback=self._stays_inline)
        self._file = file
        self._readers = readers
        self._min_bytes = default_min_bytes() if min_bytes is None else min_bytes
        self._arena = arena
        self._timeout = timeout
        self.dispatch_table: dict[type, Callable[[Any], Any]] = {
            **copyreg.dispatch_table,
            torch.Tensor: self._reduce_tensor,
            torch.nn.Parameter: self._reduce_parameter,
            torch.UntypedStorage: self._reduce_storage,
            torch.storage.TypedStorage: self._reduce_typed_storage,
            _core.SharedTensor: self._reduce_handle,
            _Inline: _Inline.reduce,
        }
        if numpy := sys.modules.get("numpy"):
            self.dispatch_table[numpy.ndarray] = self._reduce_array
        self._forget(self._min_bytes)

    def dump(self, obj: Any) -> None:
        """Write a pickle of an object."""
        try:
            content = self._apart(obj)
            readers = self._readers if self._handles else None
            # What was published knows them already; handles of the object do not.
            with contextlib.nullcontext() if readers is None else _core.readers(readers):
                data = pickle.dumps(_Envelope(*content), 5) if self._order else content[-1]
            try:
                self._file.write(data)
            except BaseException:
                discard_blob(data)
                raise
        finally:
            self._forget(self._min_bytes)

    def _apart(self, obj: Any) -> Apart:
        super().dump(obj)
        shared = publish(self._leaves, self._arena, self._timeout, self._readers) if self._leaves else []
        if shared is None:
            self._forget(None)
            super().dump(obj)
            shared = []
        return shared, self._handles, self._order, self._inner.getvalue()

    def _forget(self, least: int | None) -> None:
        self.clear_memo()
        self._inner.seek(0)
        self._inner.truncate()
        self._least = least
        self._leaves: list[Any] = []
        self._handles: list[SharedTensor] = []
        # For each "next buffer" which leaf it is, and whether it has to be a buffer indeed; of handles that the object
        # contains the inverse of their index.
        self._order: list[tuple[int, bool]] = []
        self._markers: dict[int, tuple[pickle.PickleBuffer, int]] = {}
        # By address, of which no other comes into being while these are alive.
        self._storages: dict[int, tuple[torch.UntypedStorage, int | _Inline]] = {}

    def _is_large(self, nbytes: int) -> bool:
        return self._least is not None and nbytes >= self._least

    def _place(self, index: int) -> pickle.PickleBuffer:
        marker = pickle.PickleBuffer(bytearray())
        self._markers[id(marker)] = marker, index
        return marker

    def _stays_inline(self, buffer: pickle.PickleBuffer) -> bool:
        if id(buffer) in self._markers:
            self._order.append((self._markers[id(buffer)][1], False))
            return False
        numpy = sys.modules.get("numpy")
        raw = buffer.raw()
        if numpy is None or not self._is_large(raw.nbytes):
            return True
        self._order.append((len(self._leaves), True))
        self._leaves.append(numpy.frombuffer(raw, numpy.uint8))
        return False

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        if not storable(tensor) or tensor.is_conj() or tensor.is_neg() or tensor.__dict__:
            # Ends at a storage, too.
            return tensor.__reduce_ex__(5)  # type: ignore[no-untyped-call]
        storage = tensor.untyped_storage()
        whole = tensor.nbytes == storage.nbytes() and tensor.is_contiguous()
        known = storage._cdata in self._storages
        place = self._place_of(storage, tensor if whole else None)
        if whole and not known and isinstance(place, pickle.PickleBuffer):
            return _tensor, (place,)
        return _tensor, (place, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())

    def _reduce_parameter(self, parameter: torch.nn.Parameter) -> Any:
        if storable(parameter.data):
            # Known before its tensor is, it is a storage in the pickle, and so it is copied: torch makes no Parameter
            # of a handle.
            self._place_of(parameter.untyped_storage(), None)
        return parameter.__reduce_ex__(5)  # type: ignore[no-untyped-call]

    def _reduce_storage(self, storage: torch.UntypedStorage) -> Any:
        if storage.device.type != "cpu":
            return storage.__reduce_ex__(5)
        return _storage, (self._place_of(storage, None),)

    def _reduce_typed_storage(self, storage: torch.storage.TypedStorage) -> Any:
        untyped = storage._untyped_storage
        if untyped.device.type != "cpu":
            return storage.__reduce_ex__(5)
        return _typed_storage, (self._place_of(untyped, None), storage.dtype)

    def _place_of(self, storage: torch.UntypedStorage, tensor: torch.Tensor | None) -> pickle.PickleBuffer | _Inline:
        known = self._storages.get(storage._cdata)
        if known is not None:
            place = known[1]
        elif self._is_large(storage.nbytes()):
            place = len(self._leaves)
            self._leaves.append(
                torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage) if tensor is None else tensor
            )
        else:
            place = _Inline(storage)
        self._storages[storage._cdata] = storage, place
        return place if isinstance(place, _Inline) else self._place(place)

    def _reduce_array(self, array: Any) -> Any:
        if not storable_array(array) or not self._is_large(array.nbytes):
            return array.__reduce_ex__(5)
        self._leaves.append(array)
        return _array, (self._place(len(self._leaves) - 1), array.flags.f_contiguous and not array.flags.c_contiguous)

    def _reduce_handle(self, handle: SharedTensor) -> Any:
        self._handles.append(handle)
        return _handle, (self._place(~(len(self._handles) - 1)),)


class _Inline:
    """Memory that is too small to be published; a pickler knows it again by this object."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage

    def reduce(self) -> Any:
        return _restored_storage, (_copied(self._storage.data_ptr(), self._storage.nbytes()),)


# Not ctypes.string_at, whose size is a C int.
_memory = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_READ = 0x100


def _copied(address: int, nbytes: int) -> bytearray:
    return bytearray(_memory(address, nbytes, _READ)) if nbytes else bytearray()


class _Envelope:
    """The outer pickle."""

    def __init__(self, *content: Any) -> None:
        self._content = content

    def __reduce__(self) -> Any:
        return _restore, self._content


# ---- loading


class Unpickler(pickle.Unpickler):
    """A ``pickle.Unpickler`` for what :class:`Pickler` writes; see :func:`loads`.

    Its ``find_class`` is asked for the classes of the object, too, so a subclass may refuse some; it has to allow those
    of ``shmx.pickling``.

    Parameters
    ----------
    file
        Read from.
    device, lazy
        As for :func:`loads`.
    """

    def __init__(self, file: _Reader, *, device: torch.device | str | int | None = None, lazy: bool = False) -> None:
        """Read nothing yet."""
        super().__init__(file)
        self._device = device
        self._lazy = lazy
        self._restored = False

    def find_class(self, module: str, name: str, /) -> Any:
        """Find a class or function by its name."""
        if module == __name__ and name == "_restore":
            return self._restore
        return super().find_class(module, name)

    def load(self) -> Any:
        """Load the next pickle of the file."""
        try:
            return super().load()
        finally:
            if self._restored:
                # Else it would hold what it has loaded, and itself by way of a method.
                self._restored = False
                self.memo: Any = {}

    def _restore(self, shared: Sequence[Any], handles: Sequence[Any], order: _Order, data: bytes) -> Any:
        self._restored = True
        if not self._lazy:
            for one in shared:
                if one.error is not None:
                    raise one.error
        slots = [_Slot(one, self._device, self._lazy) for one in shared]
        return _Inner(self, data, _given(slots, handles, order)).load()


class _Inner(pickle.Unpickler):
    """Loads the object itself, and asks the unpickler around it."""

    def __init__(self, outer: Unpickler, data: bytes, buffers: list[Any]) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._outer = outer

    def find_class(self, module: str, name: str, /) -> Any:
        return self._outer.find_class(module, name)

    def persistent_load(self, pid: Any, /) -> Any:
        return self._outer.persistent_load(pid)


_Order = Sequence[tuple[int, bool]]


def _restore(shared: Sequence[Any], handles: Sequence[Any], order: _Order, data: bytes) -> Any:
    return pickle.loads(data, buffers=_given([_Slot(one, None, False) for one in shared], handles, order))


def _given(slots: Sequence[_Slot], handles: Sequence[Any], order: _Order) -> list[Any]:
    given: list[Any] = []
    for index, is_buffer in order:
        if index < 0:
            given.append(handles[~index])
        else:
            given.append(slots[index].handle.materialize() if is_buffer else slots[index])
    return given


class _Slot:
    """One published tensor or array while a pickle is loaded, and the one copy of it."""

    def __init__(self, handle: SharedTensor | SharedArray, device: torch.device | str | int | None, lazy: bool) -> None:
        self.handle = handle
        self._device = device
        self._lazy = lazy
        self._own: Any = None

    def whole(self) -> Any:
        return self.handle if self._lazy else self.own()

    def own(self) -> Any:
        """A copy; the handle if there is no data any more."""
        if self._own is None:
            self._own = self.handle.materialize(self._device) if self.handle.is_available else self.handle
        return self._own


def _tensor(place: _Slot | torch.UntypedStorage, dtype: torch.dtype | None = None, *layout: Any) -> Any:
    if dtype is None:
        return place.whole()  # type: ignore[union-attr]
    storage = _storage(place)
    if not isinstance(storage, torch.UntypedStorage):
        return storage
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *layout)


def _storage(place: _Slot | torch.UntypedStorage) -> Any:
    if isinstance(place, torch.UntypedStorage):
        return place
    own = place.own()
    return own.untyped_storage() if isinstance(own, torch.Tensor) else own


def _typed_storage(place: _Slot | torch.UntypedStorage, dtype: torch.dtype) -> Any:
    storage = _storage(place)
    if not isinstance(storage, torch.UntypedStorage):
        raise storage.error
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _restored_storage(data: bytearray) -> torch.UntypedStorage:
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage()  # type: ignore[no-untyped-call]


def _array(place: _Slot, fortran: bool) -> Any:
    array = place.whole()
    return array.copy(order="F") if fortran and not isinstance(array, SharedArray) else array


def _handle(handle: SharedTensor) -> SharedTensor:
    return handle


# ---- msgpack, as msgspec writes it

EXT_CODE = ord("S")
_TENSOR, _ARRAY = 0, 1


def enc_hook(obj: Any) -> Any:
    """Encode tensors, arrays and handles in msgpack: ``msgspec.msgpack.encode(obj, enc_hook=shmx.enc_hook)``.

    Large tensors are published, each in a block and a message of its own, announced as in a pickle
    (``with shmx.readers(n)``); small ones are inline. Handles, as :func:`wrap` makes them, are encoded as they are.

    Parameters
    ----------
    obj
        ``torch.Tensor``, ``numpy.ndarray``, :class:`SharedTensor` or :class:`SharedArray`.

    Returns
    -------
    msgspec.msgpack.Ext
        Of code 83.

    Raises
    ------
    NotImplementedError
        Any other object, as msgspec expects; a tensor or array whose values are not plain bytes on the CPU;
        an array of records, published or not.
    """
    msgpack = sys.modules["msgspec"].msgpack
    numpy = sys.modules.get("numpy")
    content: tuple[Any, ...]
    if isinstance(obj, _core.SharedTensor):
        content = (_TENSOR, _announced(obj))
    elif isinstance(obj, SharedArray) and obj.dtype.names is None:
        content = (_ARRAY, _announced(obj.tensor), obj.dtype.str, obj.shape)
    elif type(obj) is torch.Tensor and storable(obj):
        if obj.nbytes >= default_min_bytes() and (shared := publish([obj], None, None)):
            return enc_hook(shared[0])
        plain = obj.resolve_conj().resolve_neg().contiguous()
        data = _copied(plain.data_ptr(), plain.nbytes)
        content = (_TENSOR, data, str(obj.dtype).removeprefix("torch."), tuple(obj.shape))
    elif numpy and type(obj) is numpy.ndarray and storable_array(obj) and obj.dtype.names is None:
        if obj.nbytes >= default_min_bytes() and (shared := publish([obj], None, None)):
            return enc_hook(shared[0])
        content = (_ARRAY, obj.tobytes(), obj.dtype.str, obj.shape, True)
    else:
        raise NotImplementedError(
            f"shmx encodes dense CPU tensors, arrays of plain numbers, and handles, not {type(obj)}"
        )
    return msgpack.Ext(EXT_CODE, msgpack.encode(content))


def _announced(handle: SharedTensor) -> bytes:
    data = handle.to_bytes()
    if _is_announced(data) or not handle.is_available or _core.current_readers() == 0:
        return data
    # Its block has as many messages on their way as it can. Tensors that were wrapped together are one message in a
    # pickle, but as many here as they are.
    return default_arena().share(handle.view().clone()).to_bytes()


def _is_announced(data: bytes) -> bool:
    return bool(data[3] & 1)


def ext_hook(code: int, data: memoryview | bytes) -> Any:
    """Decode what :func:`enc_hook` has encoded: ``msgspec.msgpack.Decoder(..., ext_hook=shmx.ext_hook)``.

    Returns
    -------
    SharedTensor or SharedArray, or torch.Tensor or numpy.ndarray
        The handle of a large one, which never raises because data is gone; a small one itself. An ``Ext`` of another
        code is returned as it is.

    Raises
    ------
    InvalidHandleError
        The data is damaged or hostile.
    """
    msgspec = sys.modules["msgspec"]
    if code != EXT_CODE:
        return msgspec.msgpack.Ext(code, bytes(data))
    try:
        content = msgspec.msgpack.decode(data)
        kind, raw, *rest = content
        if kind == _TENSOR and not rest:
            return _core.SharedTensor.from_bytes(raw)
        if kind == _ARRAY and len(rest) == 2:
            return SharedArray.described(_core.SharedTensor.from_bytes(raw), *rest)
        if kind == _TENSOR:
            dtype, shape = rest
            if dtype not in _core.DTYPE_NAMES:
                raise ValueError(f"no dtype {dtype!r}")
            flat = (
                torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)) if raw else torch.empty(0, device="cpu")
            )
            return flat.to(getattr(torch, dtype)).reshape(shape)
        import numpy as np

        dtype, shape, _ = rest
        return np.frombuffer(bytearray(raw), np.dtype(dtype)).reshape(shape)
    except InvalidHandleError:
        raise
    except Exception as error:
        raise InvalidHandleError(f"not what shmx.enc_hook encodes: {error}") from error


def dec_hook(expected: type, obj: Any) -> Any:
    """Decode fields that are annotated as tensors: ``msgspec.msgpack.Decoder(type, dec_hook=shmx.dec_hook)``.

    Parameters
    ----------
    expected
        The annotation. ``shmx.SharedTensor`` and ``shmx.SharedArray`` give the handle; ``torch.Tensor`` and
        ``numpy.ndarray`` give memory of the caller's own, and raise here if the data is gone.
    obj
        What was decoded so far.

    Raises
    ------
    NotImplementedError
        Another annotation.
    StaleHandleError, SegmentLostError, ForeignHostError
        As :meth:`SharedTensor.materialize`.
    """
    msgspec = sys.modules["msgspec"]
    # numpy.typing.NDArray[...] is no class.
    expected = typing.get_origin(expected) or expected
    if isinstance(obj, msgspec.msgpack.Ext) and obj.code == EXT_CODE:
        obj = ext_hook(obj.code, obj.data)
    if isinstance(obj, expected):
        return obj
    if isinstance(obj, _core.SharedTensor | SharedArray):
        own = obj.materialize()
        if isinstance(own, expected):
            return own
    raise NotImplementedError(f"shmx decodes tensors, arrays and handles, not {type(obj)} as {expected}")
