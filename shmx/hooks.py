"""Tensors inside requests: :func:`wrap` puts handles in their places, :func:`unwrap` puts tensors back.

`shmx.walk` knows the containers; this file knows what is put where, and what happens when something fails.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, overload

import torch

from shmx import _core
from shmx.arena import Arena, default_arena, discard_blob, note_inline_fallback
from shmx.array import SharedArray, storable_array
from shmx.config import default_min_bytes
from shmx.device import materialize_many
from shmx.errors import ArenaFullError
from shmx.walk import Graph, Kinds

if TYPE_CHECKING:
    import torch.distributed as dist

    from shmx._core import SharedTensor

__all__ = ["discard", "has_shared", "unwrap", "wrap"]

_T = TypeVar("_T")

_STORED = frozenset(getattr(torch, name) for name in _core.DTYPE_NAMES if hasattr(torch, name))


def storable(tensor: torch.Tensor) -> bool:
    """Whether a handle says all there is to say about a tensor: dense, on the CPU, without a gradient."""
    return (
        tensor.is_cpu
        and not tensor.requires_grad
        and tensor.layout is torch.strided
        and tensor.dtype in _STORED
        and not tensor.is_nested
    )


def _is_private(cls: type) -> bool:
    if cls is torch.Tensor:
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and cls is numpy.ndarray


def _is_shared(cls: type) -> bool:
    return cls is _core.SharedTensor or cls is SharedArray


# What each of the two walks looks for; both know the same containers.
_PRIVATE = Kinds(_is_private)
_SHARED = Kinds(_is_shared)


def wrap(
    obj: _T,
    *,
    min_bytes: int | None = None,
    readers: int | None = None,
    arena: Arena | None = None,
    timeout: float | None = None,
) -> _T:
    """Publish the tensors inside an object and put handles in their places, so that any transport may carry it.

    Looks into dict, list, tuple, set, deque and their subclasses, named tuples, dataclasses, attrs classes, pydantic
    models, ``msgspec.Struct``, ``SimpleNamespace`` and other objects with attributes, and into what
    :func:`register_container` names; not into keys of a dict, modules of torch, and objects of the standard library.
    What can be changed is changed in place; what cannot, a tuple or a frozen class, is made anew. One tensor in several
    places is one handle in all of them, and cycles are kept.

    All tensors share one block and one message. Wrapping twice changes nothing.

    Parameters
    ----------
    obj
        A tensor, an array, or an object with some inside, at any depth.
    min_bytes
        Leave what is smaller where it is; a few KiB travel faster in the pickle. Default 64 KiB, or
        ``SHMX_MIN_BYTES``.
    readers
        How often each pickle of the result will be loaded; without it ``with shmx.readers(n)`` around the pickling, or
        one load.
    arena, timeout
        Where to publish (the default arena), and how many seconds to wait for room there (none).

    Returns
    -------
    object
        ``obj``, or what stands for it if it cannot be changed. The handles hold the block until it is collected;
        :func:`discard` lets go of it earlier.

    Notes
    -----
    Tensors that require grad, are not dense or not on the CPU, subclasses of ``torch.Tensor`` and ``numpy.ndarray``,
    and arrays of objects stay where they are, and so does everything while the arena is full: that is counted
    (``inline_fallbacks`` of :func:`stats`) and warned of once. Values only: two tensors over the same memory become
    independent of each other.

    Raises
    ------
    TypeError
        A container cannot be made anew. Then nothing is changed and nothing stays published.
    """
    least = default_min_bytes() if min_bytes is None else min_bytes
    graph = Graph(obj, _PRIVATE, functools.partial(_is_worth_it, least))
    if not graph.leaves:
        return obj
    shared = publish(graph.leaves, arena, timeout, readers)
    if shared is None:
        return obj
    result: _T = graph.replaced(dict(zip(map(id, graph.leaves), shared, strict=True)))
    return result


def _is_worth_it(least: int, leaf: Any) -> bool:
    if type(leaf) is not torch.Tensor:
        return leaf.nbytes >= least and storable_array(leaf)
    nbytes = leaf.numel() * leaf.itemsize
    if nbytes < least or not storable(leaf):
        return False
    # Elements that are one and the same in memory are fewer in a pickle; a storage that was freed has none.
    return leaf.untyped_storage().nbytes() >= nbytes


def publish(
    leaves: Sequence[Any], arena: Arena | None, timeout: float | None, readers: int | None = None
) -> list[SharedTensor | SharedArray] | None:
    """Share tensors and arrays in one block; nothing, counted and warned of, if the arena is full."""
    tensors = [leaf if type(leaf) is torch.Tensor else SharedArray.stored(leaf) for leaf in leaves]
    try:
        handles = (arena or default_arena()).share_many(tensors, timeout=timeout, readers=readers)
    except ArenaFullError as error:
        note_inline_fallback(len(leaves), error)
        return None
    return [
        handle if type(leaf) is torch.Tensor else SharedArray.of(handle, leaf)
        for handle, leaf in zip(handles, leaves, strict=True)
    ]


@overload
def unwrap(
    obj: _T,
    *,
    device: torch.device | str | int | None = ...,
    on_error: Literal["raise"] = ...,
    lazy: bool = ...,
    fanout: Literal["direct", "broadcast"] = ...,
    group: dist.ProcessGroup | None = ...,
) -> _T: ...


@overload
def unwrap(
    obj: _T,
    *,
    device: torch.device | str | int | None = ...,
    on_error: Literal["return"],
    lazy: bool = ...,
    fanout: Literal["direct", "broadcast"] = ...,
    group: dist.ProcessGroup | None = ...,
) -> tuple[_T, list[Exception | None]]: ...


def unwrap(
    obj: Any,
    *,
    device: torch.device | str | int | None = None,
    on_error: Literal["raise", "return"] = "raise",
    lazy: bool = False,
    fanout: Literal["direct", "broadcast"] = "direct",
    group: dist.ProcessGroup | None = None,
) -> Any:
    """Put tensors that the caller owns in the places of the handles inside an object; the inverse of :func:`wrap`.

    Handles in several places become one tensor in all of them. Unwrapping twice changes nothing.

    Parameters
    ----------
    obj
        What :func:`wrap` returned, here or in another process of this host; or a list of such requests.
    device
        Where to put the tensors; by default the CPU. The tensors of one request go there in one submission, as by
        :func:`shmx.device.materialize_many`. Arrays always come back as arrays.
    on_error
        ``"raise"``: a tensor without data raises its reason, and the object stays as it was, so that nothing is lost.
        ``"return"``: return ``(obj, errors)`` with the error or None of each request; a request that failed keeps its
        handles, the others are unwrapped. The requests are the elements of a list or tuple, or of the list ``.batch``
        of a batched request; anything else is one request.
    lazy
        Copy nothing yet: the handles stay, each holding its data, until they are given to a torch function, which gets
        the tensor (on ``device``).
    fanout, group
        ``"direct"``: every rank copies from shared memory to its own device. ``"broadcast"``: the first rank of
        ``group`` (by default all ranks) does, and the others receive from its device through torch.distributed; see
        :func:`shmx.distributed.fan_out`. All ranks of the group call with the same object.

    Returns
    -------
    object, or (object, list)
        As ``on_error`` says. Every handle holds its block as long as it lives: drop a tuple that was made anew.

    Raises
    ------
    StaleHandleError, SegmentLostError, ForeignHostError, ReleasedError, InvalidHandleError, TooManyPeersError
        Why a tensor has no data, unless ``on_error="return"``.
    DeviceError
        The device failed.
    ValueError
        ``on_error`` or ``fanout`` is neither of the two; a broadcast without a device, or with ``lazy``.
    """
    if on_error not in ("raise", "return"):
        raise ValueError(f"on_error is 'raise' or 'return', not {on_error!r}")
    put = _put_by(device, lazy, fanout, group)
    graph = Graph(obj, _SHARED)
    owned: dict[int, Any] = {}
    if on_error == "raise":
        if error := _own(graph.leaves, owned, put):
            raise error
        return graph.replaced(owned)
    errors: list[Exception | None] = []
    failed: set[int] = set()
    unchanged: list[Any] = []
    for request in _requests(obj):
        leaves = Graph(request, _SHARED).leaves
        errors.append(_own(leaves, owned, put))
        if errors[-1] is not None:
            failed.update(map(id, leaves))
            unchanged.append(request)
    rest = [leaf for leaf in graph.leaves if id(leaf) not in failed]
    # What belongs to none of the requests belongs to all of them.
    if error := _own(rest, owned, put):
        errors = [one or error for one in errors]
    if unchanged:
        # It may share handles with requests that did not fail.
        graph = Graph(obj, _SHARED, without=unchanged)
    return graph.replaced(owned), errors


def _requests(obj: Any) -> Iterable[Any]:
    try:
        batch = getattr(obj, "batch", None)
    except Exception:
        batch = None  # a property of a program, which may not be ready
    for requests in (obj, batch):
        if type(requests) is list or type(requests) is tuple:
            return requests
    return (obj,)


# What is to be in the places of handles, by their ids; those that are to stay are not in it.
_Put: TypeAlias = "Callable[[Sequence[SharedTensor | SharedArray]], dict[int, Any]]"


def _put_by(device: torch.device | str | int | None, lazy: bool, fanout: str, group: dist.ProcessGroup | None) -> _Put:
    if fanout not in ("direct", "broadcast"):
        raise ValueError(f"fanout is 'direct' or 'broadcast', not {fanout!r}")
    if fanout == "broadcast":
        if device is None or lazy:
            raise ValueError("fanout='broadcast' copies to devices, and at once: give device=, and leave out lazy=")
        # Only now: not every torch has torch.distributed.
        from shmx.distributed import fan_out

        return functools.partial(_put, functools.partial(fan_out, device=device, group=group))
    if lazy:
        return functools.partial(_leave, device)
    return functools.partial(_put, functools.partial(_copy, device))


def _check(leaves: Iterable[SharedTensor | SharedArray]) -> None:
    for leaf in leaves:
        if (error := leaf.error) is not None:
            raise error


def _copy(device: torch.device | str | int | None, handles: Sequence[SharedTensor]) -> Sequence[torch.Tensor]:
    _check(handles)
    return materialize_many(handles, "cpu" if device is None else device)


def _put(
    copy: Callable[[Sequence[SharedTensor]], Sequence[torch.Tensor]], leaves: Sequence[SharedTensor | SharedArray]
) -> dict[int, Any]:
    handles = [leaf for leaf in leaves if isinstance(leaf, _core.SharedTensor)]
    arrays = [leaf for leaf in leaves if isinstance(leaf, SharedArray)]
    placed: dict[int, Any] = dict(zip(map(id, handles), copy(handles), strict=True))
    _check(arrays)
    placed.update((id(leaf), leaf.materialize()) for leaf in arrays)
    return placed


def _leave(device: torch.device | str | int | None, leaves: Sequence[SharedTensor | SharedArray]) -> dict[int, Any]:
    _check(leaves)
    if device is not None:
        _devices.update((leaf, device) for leaf in leaves if isinstance(leaf, _core.SharedTensor))
    return {}


def _own(leaves: Sequence[SharedTensor | SharedArray], owned: dict[int, Any], put: _Put) -> Exception | None:
    """Add to `owned` what stands for each handle; all of them, or none and the reason."""
    try:
        owned.update(put([leaf for leaf in leaves if id(leaf) not in owned]))
    except Exception as error:
        return error
    return None


def discard(obj: Any) -> int:
    """Give back what will not be sent or loaded: a message, or the shared memory of a wrapped object.

    Parameters
    ----------
    obj
        ``bytes``, ``bytearray`` or ``memoryview``: a pickle, the result of :func:`dumps` or of ``to_bytes``. Its
        messages are taken back. It is scanned, not loaded: nothing in it is executed.
        Anything else: a wrapped object. The handles inside it are released; the object is of no use afterwards.

    Returns
    -------
    int
        How many announced messages were taken back, or how many handles were released.

    Raises
    ------
    InvalidHandleError
        Bytes that are neither a pickle nor a handle.
    """
    if isinstance(obj, bytes | bytearray | memoryview):
        return discard_blob(obj)
    leaves = Graph(obj, _SHARED).leaves
    for leaf in leaves:
        leaf.release()
    return len(leaves)


def has_shared(obj: Any) -> bool:
    """Whether there is a handle inside an object, so that :func:`unwrap` would change it."""
    return bool(Graph(obj, _SHARED).leaves)


# ---- handles as arguments of torch functions

_devices: weakref.WeakKeyDictionary[SharedTensor, torch.device | str | int | None] = weakref.WeakKeyDictionary()
_deferred: weakref.WeakKeyDictionary[SharedTensor, torch.Tensor] = weakref.WeakKeyDictionary()


def _materialized(handle: SharedTensor) -> torch.Tensor:
    tensor = _deferred.get(handle)
    if tensor is None:
        # Two threads may both copy: one of the copies stays.
        tensor = _deferred.setdefault(handle, handle.materialize(_devices.get(handle)))
    return tensor


def _as_tensors(value: Any) -> Any:
    if isinstance(value, _core.SharedTensor):
        return _materialized(value)
    if isinstance(value, list | tuple):
        # Plain ones: torch looks into subclasses, too, and would ask again.
        return (list if isinstance(value, list) else tuple)([_as_tensors(one) for one in value])
    if type(value) is dict:
        return {key: _as_tensors(one) for key, one in value.items()}
    return value


def _torch_function(
    cls: type,
    func: Callable[..., Any],
    types: Sequence[type],
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Call a torch function with the tensor that a handle stands for; it is materialized once."""
    return func(*_as_tensors(tuple(args)), **_as_tensors(kwargs or {}))


_core.SharedTensor.__torch_function__ = classmethod(_torch_function)  # type: ignore[method-assign,assignment]
