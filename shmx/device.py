"""Copies between shared memory and a device: by one asynchronous transfer where the pages are locked.

A segment is registered with the driver once per process, in the background. From then on a copy is one DMA straight
from (or to) the shared pages, and the block stays in use until an event behind the copy has completed. Before that, and
where no driver registers anything, bytes go through a small ring of page-locked buffers or are copied synchronously:
slower, and as correct.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from shmx import _core
from shmx.errors import DeviceError

if TYPE_CHECKING:
    from shmx._core import SharedTensor

__all__ = ["DRIVERS", "StagingRing", "materialize", "materialize_into", "materialize_many"]

_logger = logging.getLogger("shmx")

DRIVERS: dict[str, str] = {"cuda": "hip" if torch.version.hip else "cuda"}
"""Which driver locks pages for a torch device type: ``"cuda"`` or ``"hip"``. Others are copied to without."""

# Below it a driver stages by itself in less time than the ring takes to set out.
_FEWEST_STAGED = 1 << 20
_STAGING_CHUNK = 4 << 20
_STAGING_DEPTH = 2

_lost: list[torch.Tensor] = []
"""Destinations in an arena that a broken device may write to yet; they stay in use."""


def materialize(
    handle: SharedTensor, device: torch.device | str | int, stream: Any = None, non_blocking: bool = True
) -> torch.Tensor:
    """Copy a shared tensor to ``device``; as :func:`materialize_many` of one."""
    return materialize_many([handle], device, stream=stream, non_blocking=non_blocking)[0]


def materialize_many(
    handles: Iterable[SharedTensor],
    device: torch.device | str | int,
    *,
    stream: Any = None,
    non_blocking: bool = True,
) -> list[torch.Tensor]:
    """Copy shared tensors to ``device`` in one submission: one event, one release, neighbours by one transfer.

    Parameters
    ----------
    handles
        The shared tensors. Those that were published together (:func:`shmx.share_many`) lie side by side: they are
        transferred as one, and the results share one allocation on the device.
    device
        Anything that ``torch.device`` takes. ``"cpu"`` gives owned tensors, as without a device.
    stream
        The device stream to allocate and copy on; by default the current one. If it is another one, the current stream
        waits for the copies, so that the results may be used on it at once.
    non_blocking
        Return as soon as the copies are in the stream. Pages that are not locked are read before this returns in any
        case.

    Returns
    -------
    list of torch.Tensor
        Contiguous tensors on ``device`` that the caller owns, in the order of ``handles``. The handles may be released
        at once: their blocks stay in use until the copies are done.

    Raises
    ------
    DeviceError
        The device failed, or the stream or the current one is capturing a graph.
    StaleHandleError, SegmentLostError, ReleasedError
        As :meth:`SharedTensor.view`.
    """
    handles = list(handles)
    target = _resolve(device)
    if target.type == "cpu":
        return [handle.materialize() for handle in handles]
    current = _current_stream(target)
    if current is None:
        return [handle.view().to(target) for handle in handles]
    if stream is not None and stream.device != target:
        raise ValueError(f"the stream is one of {stream.device}, the tensors go to {target}; give one of that device")
    chosen = current if stream is None else _for_this_thread(stream)
    if chosen != current:
        # It is made to wait for the copies, which would break its capture.
        _refuse_capture(current)
    with _on(target), torch.no_grad(), chosen:
        copy = _begin(handles, target, chosen)
        groups = copy.groups()
        results: list[Any] = [None] * len(handles)
        destinations = []
        for members, nbytes, _, _ in groups:
            if len(members) == 1:
                handle = handles[members[0][0]]
                results[members[0][0]] = whole = torch.empty(handle.shape, dtype=handle.dtype, device=target)
                destinations.append(whole)
                continue
            together = torch.empty(nbytes, dtype=torch.uint8, device=target)
            destinations.append(together)
            for index, offset in members:
                handle = handles[index]
                part = together[offset : offset + handle.nbytes]
                results[index] = part.view(handle.dtype).view(handle.shape)
        for index, handle in enumerate(handles):
            if results[index] is None:
                results[index] = torch.empty(handle.shape, dtype=handle.dtype, device=target)
        _transfer(copy, groups, handles, destinations, chosen)
        if chosen != current:
            current.wait_stream(chosen)
            for destination in destinations:
                _use_on(destination, current)
    if not non_blocking:
        _synchronize(chosen)
        _core.poll_copies()
    return results


def materialize_into(handle: SharedTensor, destination: torch.Tensor) -> torch.Tensor:
    """Copy a shared tensor into one on a device, on the current stream, without waiting for it.

    Shapes and dtypes are equal (:meth:`SharedTensor.materialize_into` has seen to it).
    """
    target = destination.device
    stream = _current_stream(target)
    if stream is None:
        return destination.copy_(handle.view())
    into = destination.detach()
    plain = into.is_contiguous() and not into.is_conj() and not into.is_neg()
    with _on(target), torch.no_grad(), stream:
        copy = _begin([handle], target, stream)
        groups = copy.groups()
        whole = into if plain else torch.empty(into.shape, dtype=into.dtype, device=target)
        _transfer(copy, groups, [handle], [whole] * len(groups), stream)
        if not plain:
            into.copy_(whole)
    return destination


def fill_from_devices(copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy tensors on devices into others that lie in an arena of this process; complete on return.

    Each is a pair of destination and source. By one transfer straight into the shared pages where they are locked, and
    with one wait for all that come from one device.
    """
    by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for destination, source in copies:
        by_device.setdefault(source.device, []).append((destination, source))
    for device, of_device in by_device.items():
        _fill_from(device, of_device)


def _fill_from(device: torch.device, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    stream = _current_stream(device)
    backend = DRIVERS.get(device.type)
    if stream is None or backend is None:
        for destination, source in copies:
            destination.copy_(source)
        return
    _refuse_capture(stream)
    _warn()
    kept = []
    try:
        with _on(device), torch.no_grad(), stream:
            for destination, source in copies:
                cuts = _core.registered_cuts(destination.data_ptr(), destination.nbytes, backend, device.index or 0)
                if cuts is None:
                    # Not straight: the driver refuses a copy that spans what is locked and what is not, and the
                    # background may be locking the pages at this moment.
                    destination.copy_(source.cpu())
                    continue
                plain = source.resolve_conj().resolve_neg().contiguous()
                kept.append(plain)
                for into, part in zip(_pieces(destination, cuts), _pieces(plain, cuts), strict=True):
                    into.copy_(part, non_blocking=True)
            if kept:
                stream.synchronize()
    except RuntimeError as error:
        text = f"{device} could not copy into shared memory: {error}"
        if not _is_idle(stream):
            _lost.extend(destination for destination, _ in copies)
            text += "; the block stays in use, as the device may write to it yet: restart this process"
        raise DeviceError(text) from error


def pin(handle: SharedTensor, device: torch.device | str | int | None, *, required: bool) -> None:
    """Lock the pages of a handle's arena for ``device`` now. Raises DeviceError only if it is required."""
    if device is None:
        device = torch.accelerator.current_accelerator()
    target = None if device is None else _resolve(device)
    backend = None if target is None else DRIVERS.get(target.type)
    if target is None or backend is None:
        if required:
            what = "this torch has no accelerator" if target is None else f"no driver locks pages for {target}"
            raise DeviceError(f"{what}: attach with pin='auto'")
        return
    try:
        complete = _core.pin(handle, backend, target.index or 0)
    except DeviceError as error:
        if required:
            raise
        _core.refuse_pinning(handle)
        _tell(str(error))
        return
    if required and not complete:
        raise DeviceError("SHMX_PIN_BYTES allows less than this arena has: raise it, or attach with pin='auto'")


class StagingRing:
    """Page-locked buffers through which pages that are not locked reach a device.

    While one buffer is transferred the next one is filled, so that the copy goes at the speed of the slower of the two.

    Parameters
    ----------
    device
        The device to copy to.
    chunk_bytes
        Size of a buffer.
    depth
        How many there are.
    threads
        How many threads fill a buffer.

    Raises
    ------
    RuntimeError
        torch cannot allocate page-locked memory for this device.
    """

    def __init__(
        self, device: torch.device, chunk_bytes: int = _STAGING_CHUNK, depth: int = _STAGING_DEPTH, threads: int = 1
    ) -> None:
        self._device = device
        self._chunk = chunk_bytes
        self._threads = threads
        self._helpers = ThreadPoolExecutor(threads - 1, "shmx-staging") if threads > 1 else None
        self._lock = threading.Lock()
        self._next = 0
        self._done: list[torch.Event | None] = [None] * depth
        self._buffers = [torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(depth)]

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Copy the bytes of ``source`` (uint8, CPU) to ``destination`` (uint8, device) on ``stream``.

        When it returns, all of ``source`` has been read.
        """
        with self._lock:
            for offset in range(0, source.numel(), self._chunk):
                slot = self._next
                self._next = (slot + 1) % len(self._buffers)
                event = self._done[slot]
                if event is not None:
                    event.synchronize()
                part = source[offset : offset + self._chunk]
                buffer = self._buffers[slot][: part.numel()]
                self._fill(buffer, part)
                # Before the copy: should something fail in between, the buffer waits for what came before.
                self._done[slot] = event = torch.Event(self._device)
                destination[offset : offset + part.numel()].copy_(buffer, non_blocking=True)
                event.record(stream)

    def _fill(self, buffer: torch.Tensor, part: torch.Tensor) -> None:
        share = -(-part.numel() // self._threads)
        spans = [(start, min(share, part.numel() - start)) for start in range(0, part.numel(), share)]

        def fill(start: int, nbytes: int) -> None:
            _core.copy(buffer.data_ptr() + start, part.data_ptr() + start, nbytes)

        helping = [self._helpers.submit(fill, *span) for span in spans[1:]] if self._helpers else []
        fill(*spans[0])
        for one in helping:
            one.result()


_rings: dict[torch.device, StagingRing | None] = {}
_rings_lock = threading.Lock()


def _ring(device: torch.device) -> StagingRing | None:
    with _rings_lock:
        if device not in _rings:
            try:
                _rings[device] = StagingRing(device)
            except RuntimeError:
                _rings[device] = None  # torch locks no pages for this device
        return _rings[device]


def _forget_rings() -> None:
    global _rings, _rings_lock
    _rings = {}
    _rings_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_rings)


def _resolve(device: torch.device | str | int) -> torch.device:
    if isinstance(device, int):
        accelerator = torch.accelerator.current_accelerator()
        target = torch.device("cuda" if accelerator is None else accelerator.type, device)
    else:
        target = torch.device(device)
    if target.type != "cpu" and target.index is None and _is_accelerator(target):
        target = torch.device(target.type, torch.accelerator.current_device_index())
    return target


def _is_accelerator(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


_no_change: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Make a device current: when a stream or an event goes back to another one, it makes a context there."""
    index = device.index or 0
    return _no_change if index == torch.accelerator.current_device_index() else torch.accelerator.device_index(index)


def _current_stream(device: torch.device) -> Any:
    """The current stream of a device; nothing where torch knows no streams for it."""
    return torch.accelerator.current_stream(device) if _is_accelerator(device) else None


def _for_this_thread(stream: Any) -> torch.Stream:
    """The same stream to be entered: what to go back to lies in the Python object, which threads may share."""
    return torch.Stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)


def _handle_of(stream: Any) -> int:
    handle = getattr(stream, "native_handle", None)
    return int(stream.cuda_stream if handle is None else handle)


def _refuse_capture(stream: Any) -> None:
    """Raise DeviceError before anything is in a stream that is capturing a graph."""
    if backend := DRIVERS.get(stream.device.type):
        _core.refuse_capture(backend, stream.device.index or 0, _handle_of(stream))


def _begin(handles: Sequence[SharedTensor], target: torch.device, stream: Any) -> _core.DeviceCopy:
    _warn()
    backend = DRIVERS.get(target.type)
    return _core.DeviceCopy(handles, backend, target.index or 0, _handle_of(stream) if backend else 0)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _pieces(tensor: torch.Tensor, cuts: Sequence[int]) -> list[torch.Tensor]:
    """The bytes of a contiguous tensor, cut where registrations meet: a transfer must not span two."""
    flat = _as_bytes(tensor)
    edges = [0, *cuts, flat.numel()]
    return [flat[start:end] for start, end in itertools.pairwise(edges)]


def _transfer(
    copy: _core.DeviceCopy,
    groups: Sequence[tuple[Any, int, list[int] | None, bool]],
    handles: Sequence[SharedTensor],
    destinations: Sequence[torch.Tensor],
    stream: Any,
) -> None:
    """Put the copies in the stream, and end the use of the blocks when they are done."""
    try:
        for number, ((members, nbytes, cuts, contiguous), whole) in enumerate(zip(groups, destinations, strict=True)):
            if not contiguous:
                whole.copy_(handles[members[0][0]].materialize())
                continue
            source = copy.bytes_of(number)
            if cuts is not None:
                for into, part in zip(_pieces(whole, cuts), _pieces(source, cuts), strict=True):
                    into.copy_(part, non_blocking=True)
                continue
            ring = _ring(whole.device) if nbytes >= _FEWEST_STAGED else None
            if ring is None:
                # As in _fill_from: memory of its own, where pages may be about to be locked.
                _as_bytes(whole).copy_(source.clone() if whole.device.type in DRIVERS else source)
            else:
                ring.copy(_as_bytes(whole), source, stream)
        if copy.registered:
            copy.depart()
    except BaseException as error:
        # What had been put into the stream may be reading the blocks.
        if _is_idle(stream):
            copy.finish()
            if isinstance(error, DeviceError):
                _tell(f"copies to {stream.device} are waited for: {error}")
                return
            if not isinstance(error, RuntimeError):
                raise
            raise DeviceError(f"{stream.device} could not copy from shared memory: {error}") from error
        copy.keep()
        raise DeviceError(
            f"{stream.device} failed during a copy from shared memory: {error}; the blocks stay in use, as the device "
            "may read them yet: restart this process"
        ) from error
    copy.finish()


def _is_idle(stream: Any) -> bool:
    try:
        stream.synchronize()
    except RuntimeError:
        return False
    return True


def _synchronize(stream: Any) -> None:
    try:
        stream.synchronize()
    except RuntimeError as error:
        raise DeviceError(f"{stream.device} failed during a copy from shared memory: {error}") from error


def _use_on(tensor: torch.Tensor, stream: Any) -> None:
    """Keep the memory from the next allocation on its own stream until ``stream`` has done with it."""
    try:
        tensor.record_stream(stream)
    except (NotImplementedError, RuntimeError):
        return  # this device's allocator does not track streams


_told: set[str] = set()


def _tell(text: str) -> None:
    if text in _told:
        return
    _told.add(text)
    _logger.warning("%s", text)
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _warn() -> None:
    """What the background thread had to tell."""
    if text := _core.take_pin_warning():
        _tell(f"pages of shared memory are not locked: {text}")
