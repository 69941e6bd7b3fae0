"""SGLang's multimodal features over shmx: ``install()`` in every process, or ``SHMX_SGLANG=1`` in the environment.

The tokenizer publishes each feature once; requests carry handles over ZMQ, through routers, broadcasts and pipeline
stages; every rank copies the bytes out when it is ready, and waits for nobody. Written against SGLang 0.5.23;
docs/sglang.md says what changes.
"""

from __future__ import annotations

import base64
import contextvars
import copy
import copyreg
import functools
import importlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch

from shmx import distributed
from shmx._core import TEXT_PREFIX, SharedTensor, readers
from shmx.arena import share
from shmx.errors import ArenaFullError, InvalidHandleError

__all__ = ["install", "installed", "plugin", "uninstall"]

# A block has room for ten messages on their way; what is sent more often is published again.
_SENDS_OF_A_BLOCK = 8


def install() -> None:
    """Replace the shared-memory transport of the installed SGLang in this process; idempotent.

    Every process of an engine needs it: tokenizers, data-parallel controllers, routers and all scheduler ranks. Before
    or after SGLang's modules are imported.

    Raises
    ------
    ModuleNotFoundError
        SGLang is not installed.
    RuntimeError
        The installed SGLang has no ``ShmPointerMMData``, or other functions around it than 0.5.23.
    """
    global _patches
    if _patches is None:
        patches = _make_patches()
        for patch in patches:
            patch.apply()
        _patches = patches


def uninstall() -> None:
    """Put SGLang's own transport back. Pointers that are still around can no longer be pickled."""
    global _patches
    if _patches is not None:
        for patch in _patches:
            patch.undo()
        _patches = None
        _origins.clear()


def installed() -> bool:
    """Whether this process uses shmx for SGLang's features."""
    return _patches is not None


def plugin() -> None:
    """Entry point ``sglang.srt.plugins``, which every process of SGLang calls: installs if ``SHMX_SGLANG`` is 1."""
    if os.environ.get("SHMX_SGLANG") == "1":
        install()


# ---- what is replaced ----


@dataclass(frozen=True)
class _Patch:
    """One object of SGLang, and what stands in its place wherever a module of SGLang refers to it."""

    original: Any
    replacement: Any
    owner: Any = None
    name: str = ""

    def apply(self) -> None:
        self._swap(self.original, self.replacement)

    def undo(self) -> None:
        self._swap(self.replacement, self.original)

    def _swap(self, old: Any, new: Any) -> None:
        if self.owner is not None:
            setattr(self.owner, self.name, new)
            return
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "sglang" and module is not None:
                for attribute in [key for key, value in vars(module).items() if value is old]:
                    setattr(module, attribute, new)


_patches: list[_Patch] | None = None


def _make_patches() -> list[_Patch]:
    mm_utils = importlib.import_module("sglang.srt.managers.mm_utils")
    common = importlib.import_module("sglang.srt.utils.common")
    receiver = importlib.import_module("sglang.srt.managers.scheduler_components.request_receiver")
    try:
        receiver_class = receiver.SchedulerRequestReceiver
        finalize, barrier = receiver_class._finalize_shm_features, receiver.barrier
        return [
            _Patch(mm_utils.ShmPointerMMData, _pointer_class(mm_utils.ShmPointerMMData)),
            _Patch(common.broadcast_pyobj, _broadcast(common.broadcast_pyobj)),
            _Patch(common.point_to_point_pyobj, _point_to_point(common.point_to_point_pyobj, mm_utils)),
            _Patch(
                mm_utils._get_is_default_transport,
                _is_default_transport(mm_utils._get_is_default_transport),
                mm_utils,
                "_get_is_default_transport",
            ),
            _Patch(finalize, _finalize(finalize), receiver_class, "_finalize_shm_features"),
            _Patch(barrier, _barrier(barrier), receiver, "barrier"),
        ]
    except AttributeError as error:
        raise RuntimeError(
            f"this SGLang is not like 0.5.23, for which shmx.integrations.sglang was written: {error}"
        ) from error


# ---- the pointer ----


def _pointer_class(original: Any) -> Any:
    class ShmPointerMMData(original):  # type: ignore[misc]
        """A feature in shared memory. Takes a segment of SGLang's own, too, and treats it as SGLang does."""

        _shared: SharedTensor | None = None
        _name: str = ""
        _is_sglangs = False

        def __init__(self, tensor: torch.Tensor, precomputed_hash: int | None = None) -> None:
            self._set(tensor.shape, tensor.dtype, precomputed_hash)
            self._shared = _origins.share(tensor)

        @property
        def shm_name(self) -> str:
            """The name of a segment of SGLang's own; of ours, a handle as text for a load that nothing announces.

            Made when somebody asks, as a block that an unannounced handle leads to is used again only under pressure.
            """
            if not self._name and self._shared is not None and self._shared.is_available:
                self._name = _text(self._shared, 0)
            return self._name

        @shm_name.setter
        def shm_name(self, name: str) -> None:
            self._name = name

        def _set(self, shape: Any, dtype: torch.dtype, precomputed_hash: int | None) -> None:
            self.shape = shape
            self.dtype = dtype
            self.precomputed_hash = precomputed_hash
            self._name = ""
            self.tensor: torch.Tensor | None = None
            self._shm_handle = None
            self._materialization_error: str | None = None

        def __getstate__(self) -> dict[str, Any]:
            if self._is_sglangs:
                return super().__getstate__()  # type: ignore[no-any-return]
            # One receiver, which loads it once.
            return self._state(self._unshared() if self._shared is None else _text(self._shared, 1))

        def _unshared(self) -> Any:
            """What stands for a handle where there is none: a tensor that came inline, or what cannot be opened."""
            return self._name if self.tensor is None else self.tensor

        def _state(self, name: Any) -> dict[str, Any]:
            return {
                "shm_name": name,
                "shape": self.shape,
                "dtype": self.dtype,
                "precomputed_hash": self.precomputed_hash,
            }

        def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
            if self._is_sglangs:
                return super().__reduce_ex__(protocol)
            # The handle itself: the pickle decides how often it will be loaded.
            name = self._unshared() if self._shared is None else self._shared
            return copyreg.__newobj__, (type(self),), self._state(name)  # type: ignore[attr-defined]

        def __setstate__(self, state: dict[str, Any]) -> None:
            name = state["shm_name"]
            # Ranks must agree on this, wherever they have it from. An empty name is ours: that of a pointer that could
            # not be decoded.
            self._is_sglangs = isinstance(name, str) and name != "" and not name.startswith(TEXT_PREFIX)
            if self._is_sglangs:
                super().__setstate__(state)
                return
            self._set(state["shape"], state["dtype"], state.get("precomputed_hash"))
            self._name = name if isinstance(name, str) else ""
            # Whatever is wrong with it concerns one request, not the loop that decodes all of them.
            try:
                self._open(name)
            except Exception as error:
                self._materialization_error = f"{type(error).__name__}: {error}"

        def _open(self, name: Any) -> None:
            if isinstance(name, torch.Tensor):
                self.tensor = name
                return
            if not isinstance(name, (str, SharedTensor)):
                raise InvalidHandleError(f"the name of a segment is text, not {type(name).__name__}")
            # A copy of a pointer releases its own handle.
            self._shared = SharedTensor(name) if isinstance(name, str) else copy.copy(name)
            self.tensor = self._shared.view()

        def materialize(self) -> torch.Tensor:
            """Writable memory of the caller's own; gives up this process's hold of the shared bytes."""
            if self._is_sglangs:
                return super().materialize()  # type: ignore[no-any-return]
            try:
                if self._materialization_error is not None:
                    raise RuntimeError(self._materialization_error)
                if self._shared is None:
                    assert self.tensor is not None
                    return self.tensor
                owned = self._shared.materialize()
                if _forwards():
                    _origins.remember(owned, copy.copy(self._shared))
                return owned
            finally:
                self.close_and_unlink()

        def close_and_unlink(self) -> None:
            """Give up this process's hold; what others still have to load stays. Idempotent."""
            if self._is_sglangs:
                super().close_and_unlink()
                return
            self.tensor = None
            if self._shared is not None:
                self._shared.release()

    # msgpack takes it for SGLang's by its names, and pickle finds it by them.
    ShmPointerMMData.__module__ = original.__module__
    ShmPointerMMData.__qualname__ = original.__qualname__
    return ShmPointerMMData


def _text(shared: SharedTensor, loads: int) -> str:
    return base64.b64encode(shared.to_bytes(readers=loads)).rstrip(b"=").decode()


class _Origins:
    """Handles of tensors that are sent more than once: the samples of one request, the next pipeline stage.

    A tensor is known while the object lives, as long as torch has not written to it. Handles go when memory is short.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Origin] = {}

    def share(self, tensor: torch.Tensor) -> SharedTensor:
        """A handle of the tensor's values that the caller may release."""
        origin = self._known.get(id(tensor))
        if origin is None or not origin.describes(tensor) or origin.sends >= _SENDS_OF_A_BLOCK:
            try:
                shared = share(tensor)
            except ArenaFullError:
                if not self._known:
                    raise
                self._known.clear()
                shared = share(tensor)
            origin = self.remember(tensor, shared)
        origin.sends += 1
        return copy.copy(origin.shared)

    def remember(self, tensor: torch.Tensor, shared: SharedTensor) -> _Origin:
        """Note that the handle has the tensor's values."""
        number = id(tensor)
        known = self._known

        def forget(gone: object) -> None:
            if number in known and known[number].tensor is gone:
                del known[number]

        origin = known[number] = _Origin(weakref.ref(tensor, forget), _version(tensor), tensor.data_ptr(), shared)
        return origin

    def forget(self, tensor: torch.Tensor) -> None:
        """Give up the handle of a tensor that will not be sent again."""
        self._known.pop(id(tensor), None)

    def clear(self) -> None:
        """Give up all handles."""
        self._known.clear()


@dataclass
class _Origin:
    tensor: weakref.ref[torch.Tensor]
    version: int | None
    address: int
    shared: SharedTensor
    sends: int = 0

    def describes(self, tensor: torch.Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.version is not None
            and (_version(tensor), tensor.data_ptr()) == (self.version, self.address)
            and (tensor.shape, tensor.dtype) == (self.shared.shape, self.shared.dtype)
        )


def _version(tensor: torch.Tensor) -> int | None:
    # Those made in inference mode do not count what is written to them.
    return None if tensor.is_inference() else tensor._version


_origins = _Origins()


# ---- the ways between processes ----


def _broadcast(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def broadcast_pyobj(
        data: Any, rank: int, dist_group: Any = None, src: int = 0, force_cpu_device: bool = True
    ) -> Any:
        if not force_cpu_device:
            return original(data, rank, dist_group, src, force_cpu_device)
        box = [data]
        distributed.broadcast_object_list(box, src, dist_group, "cpu")
        return box[0]

    return broadcast_pyobj


def _point_to_point(original: Callable[..., Any], mm_utils: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def point_to_point_pyobj(data: Any, rank: int, group: Any = None, src: int = 0, *rest: Any, **options: Any) -> Any:
        if rank == src and _forwards():
            data = [_wrapped_again(mm_utils, request) for request in data]
        with readers(1):
            return original(data, rank, group, src, *rest, **options)

    return point_to_point_pyobj


def _forwards() -> bool:
    """Whether this rank sends requests to a pipeline stage on the same host."""
    parallel = importlib.import_module("sglang.srt.runtime_context").get_parallel()
    try:
        return bool(
            parallel.pp_size > 1
            and parallel.nnodes == 1
            and parallel.pp_rank + 1 < parallel.pp_size
            and parallel.attn_tp_rank == 0
            and parallel.attn_cp_rank == 0
        )
    # What it raises where nothing is known of ranks: outside of an engine.
    except (RuntimeError, ValueError):
        return False


def _wrapped_again(mm_utils: Any, request: Any) -> Any:
    """A copy of a request, in which pointers stand for the features that this rank has materialized."""
    if isinstance(request, mm_utils.BaseBatchReq):
        if isinstance(getattr(request, "batch", None), list):
            request = copy.copy(request)
            request.batch = [_wrapped_again(mm_utils, one) for one in request.batch]
        return request
    items = getattr(getattr(request, "mm_inputs", None), "mm_items", None)
    if not items:
        return request
    wrapped = copy.copy(request)
    wrapped.mm_inputs = copy.copy(request.mm_inputs)
    wrapped.mm_inputs.mm_items = [copy.copy(item) for item in items]
    mm_utils.wrap_shm_features(wrapped)
    for value in _features(request):
        if isinstance(value, torch.Tensor):
            _origins.forget(value)
    return wrapped


def _features(request: Any) -> Iterator[Any]:
    """All features of a request, whatever stands for them."""
    for one in getattr(request, "batch", None) or [request]:
        for item in getattr(getattr(one, "mm_inputs", None), "mm_items", None) or ():
            for value in (item.feature, item.precomputed_embeddings):
                yield from value if isinstance(value, (list, tuple)) else [value]


def _is_default_transport(original: Callable[[], bool]) -> Callable[[], bool]:
    @functools.wraps(original)
    def is_default_transport() -> bool:
        """Whether features travel inline. With several nodes they need not, unless requests cross to a controller's
        other nodes by ZMQ."""
        if not original():
            return False
        parallel = importlib.import_module("sglang.srt.runtime_context").get_parallel()
        return bool(parallel.dp_size * parallel.attn_dp_size > 1)

    return is_default_transport


# ---- the barrier ----

_own_segments: contextvars.ContextVar[bool] = contextvars.ContextVar("shmx_sglang_own_segments", default=True)


def _finalize(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _finalize_shm_features(self: Any, recv_reqs: Any) -> None:
        # The same requests, so the same answer, on all ranks.
        own = any(getattr(value, "_is_sglangs", False) for request in recv_reqs or () for value in _features(request))
        token = _own_segments.set(own)
        try:
            original(self, recv_reqs)
        finally:
            _own_segments.reset(token)

    return _finalize_shm_features


def _barrier(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def barrier(*args: Any, **kwargs: Any) -> Any:
        """Only for segments that the first rank to materialize them unlinks."""
        return original(*args, **kwargs) if _own_segments.get() else None

    return barrier
