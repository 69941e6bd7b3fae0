"""Arenas, and the default arena of a process that the functions of the package use."""

from __future__ import annotations

import asyncio
import functools
import logging
import multiprocessing.util
import os
import pickletools
import threading
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch

from shmx import _core
from shmx._core import SharedTensor
from shmx.config import ArenaConfig
from shmx.device import pin as pin_arena
from shmx.errors import ArenaFullError, InvalidHandleError
from shmx.survey import arenas, prospect, shown_bytes

__all__ = [
    "Arena",
    "attach",
    "configure",
    "default_arena",
    "discard_blob",
    "empty",
    "gc",
    "share",
    "share_async",
    "share_many",
    "stats",
    "trim",
]

_logger = logging.getLogger("shmx")


class Arena(_core.Arena):
    """Shared memory of one producer process: it alone allocates in it, up to 64 processes use it.

    Most programs need only the default arena behind :func:`shmx.share`. An arena of its own gives a group of
    tensors their own capacity and lifetime.

    Parameters are those of :class:`shmx.config.ArenaConfig`; an argument that is not given is taken from the
    environment. Also a context manager that closes the arena.

    Raises
    ------
    ArenaFullError
        /dev/shm has no room for even the control segment.
    ValueError, TypeError
        A setting is out of range, or none at all; the message names it.
    """

    def __init__(
        self,
        *,
        capacity: int | str | None = None,
        segment_bytes: int | str | None = None,
        ticket_ttl: float | None = None,
        reuse_delay: float | None = None,
        scrub: bool | None = None,
        reserve: int | str | None = None,
        numa_node: int | None = None,
        group: int | str | None = None,
        backend: str | None = None,
    ) -> None:
        given = ArenaConfig(capacity, segment_bytes, ticket_ttl, reuse_delay, scrub, reserve, numa_node, group, backend)
        settings = ArenaConfig.from_environment().given() | given.given()
        super().__init__(**settings)
        _logger.info("arena %s made, backend %s, capacity %d bytes", self.name, self.backend, self.capacity)
        if settings.get("backend") == "auto" and self.backend == "memfd":
            _warn_of_memfd(self)
        # Those of dead owners that made room for it.
        _log_removals()

    def empty(
        self, shape: int | Sequence[int], *, dtype: torch.dtype | None = None, timeout: float | None = None
    ) -> torch.Tensor:
        """Make a tensor that lives in this arena; as :func:`shmx.empty`."""
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        return super().empty(sizes, dtype=dtype or torch.get_default_dtype(), timeout=timeout)

    async def share_async(
        self, tensor: torch.Tensor, *, key: str | None = None, timeout: float | None = None
    ) -> SharedTensor:
        """Publish a tensor without blocking the event loop; as :func:`shmx.share_async`."""
        short = isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.itemsize <= _SHARED_ON_THE_LOOP
        if short and key is None and (shared := self.try_share(tensor)) is not None:
            return shared
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (timeout or 0.0)
        pause = _SHORTEST_PAUSE_S
        while True:
            try:
                return await loop.run_in_executor(_copiers(), functools.partial(self.share, tensor, key=key))
            except ArenaFullError:
                if tensor.nbytes > self.capacity or loop.time() >= deadline:
                    raise
            # Waiting takes no thread: others go on sharing.
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """End allocation. The arena leaves the system when nothing in it is in use any more; idempotent."""
        super().close()
        _log_removals()

    def __enter__(self) -> Arena:
        """Use the arena in a ``with`` block."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the arena."""
        self.close()

    def __repr__(self) -> str:
        """Name, capacity and whether it is closed."""
        state = "closed" if self.closed else f"capacity={self.capacity}"
        return f"Arena({self.name}, {state})"


_warned_of_memfd = False


def _warn_of_memfd(arena: Arena) -> None:
    global _warned_of_memfd
    if _warned_of_memfd:
        return
    _warned_of_memfd = True
    message = (
        f"/dev/shm is too small for an arena of {shown_bytes(arena.capacity)}, so {arena.name} uses backend memfd: a "
        "process must load its first handle of it, or call shmx.attach, while this one lives; a later first load is a "
        'SegmentLostError. Give /dev/shm that much room (docker run --shm-size), or accept it with backend="memfd"'
    )
    _logger.warning("%s", message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


# A copy of so many bytes takes less time than handing it to another thread.
_SHARED_ON_THE_LOOP = 64 << 10
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.01

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None
_default: Arena | None = None
_configured: dict[str, Any] = {}
_inline_fallbacks = 0


def default_arena() -> Arena:
    """The arena of this process that :func:`share` and :func:`empty` use; made on first use.

    A forked child gets one of its own.
    """
    global _default
    arena = _default
    if arena is not None and not arena.closed:
        return arena
    with _lock:
        if _default is None or _default.closed:
            _default = Arena(**_configured)
        return _default


def configure(
    *,
    capacity: int | str | None = None,
    segment_bytes: int | str | None = None,
    ticket_ttl: float | None = None,
    reuse_delay: float | None = None,
    scrub: bool | None = None,
    reserve: int | str | None = None,
    numa_node: int | None = None,
    group: int | str | None = None,
    backend: str | None = None,
) -> None:
    """Set what the default arena is made with. Call it before the first :func:`share`.

    Parameters are those of :class:`shmx.config.ArenaConfig`; they win over the environment. ``group`` also says whose
    arenas this process accepts.

    Raises
    ------
    RuntimeError
        The default arena exists already.
    ValueError, TypeError
        A setting is out of range, or none at all; then nothing is set.
    """
    with _lock:
        if _default is not None and not _default.closed:
            raise RuntimeError(
                f"the default arena {_default.name} exists already; call shmx.configure before the first share, "
                "or make an Arena(...) of its own"
            )
        settings = ArenaConfig(
            capacity, segment_bytes, ticket_ttl, reuse_delay, scrub, reserve, numa_node, group, backend
        )
        if isinstance(settings.group, int):
            _core.set_trusted_group(settings.group)
        _configured.update(settings.given())


def chosen_backend() -> str:
    """The backend that the default arena of this process is to be made with: ``"shm"``, ``"memfd"`` or ``"auto"``."""
    return str(_configured.get("backend") or ArenaConfig.from_environment().backend or "shm")


def share(tensor: torch.Tensor, *, key: str | None = None, timeout: float | None = None) -> SharedTensor:
    """Publish a tensor: copy it once into shared memory and return a handle to pickle.

    Parameters
    ----------
    tensor
        A dense tensor on any device, of any strides; stored contiguous. Values only: the result does not require
        grad. A tensor made by :func:`empty`, or a slice of one, is not copied and keeps its strides; do not write
        to it afterwards.
    key
        Names the content (a hash, a request's image id). While a block with that key lives in this arena, the handle
        is of that block and the new tensor is ignored: nothing is copied or compared.
    timeout
        Seconds to wait for room if the arena is full. By default it raises at once.

    Returns
    -------
    SharedTensor
        Holds the block until it is released or collected.

    Raises
    ------
    TypeError
        Not a tensor, or sparse, meta, quantized, or of a dtype without a byte layout.
    ArenaFullError
        Capacity, /dev/shm or the memory cgroup is exhausted.
    ValueError
        The key names a tensor of another shape or dtype.
    """
    return default_arena().share(tensor, key=key, timeout=timeout)


def share_many(
    tensors: Iterable[torch.Tensor], *, timeout: float | None = None, readers: int | None = None
) -> list[SharedTensor]:
    """Publish tensors that travel together: one block, one announcement for all of them in a pickle.

    Cheaper than one :func:`share` each, above all for many small tensors. Their memory is used again when all of them
    have been released.

    Parameters
    ----------
    tensors
        Each as for :func:`share`.
    timeout
        As for :func:`share`.
    readers
        How often each pickle of them will be loaded, 0 to 4095, wherever it is made: bound to the handles, as by
        :meth:`SharedTensor.with_readers`.

    Returns
    -------
    list of SharedTensor
        In the order of ``tensors``. Handles that are pickled in one ``dumps`` count as one message, loaded once, and
        add some 40 bytes each to it; :meth:`SharedTensor.revoke` of one revokes all.

    Raises
    ------
    TypeError, ArenaFullError
        As for :func:`share`; then nothing is published.
    """
    return default_arena().share_many(tensors, timeout=timeout, readers=readers)


async def share_async(tensor: torch.Tensor, *, key: str | None = None, timeout: float | None = None) -> SharedTensor:
    """Publish a tensor from a coroutine: what takes long is copied by a thread, and the event loop runs on.

    Do not change the tensor until this returns. A call that is cancelled publishes nothing.

    Parameters
    ----------
    tensor, key
        As for :func:`share`.
    timeout
        Seconds to wait for room if the arena is full, without blocking a thread. By default it raises at once.

    Returns
    -------
    SharedTensor
        As from :func:`share`.

    Raises
    ------
    TypeError, ArenaFullError, ValueError
        As for :func:`share`.
    """
    return await default_arena().share_async(tensor, key=key, timeout=timeout)


def empty(
    shape: int | Sequence[int], *, dtype: torch.dtype | None = None, timeout: float | None = None
) -> torch.Tensor:
    """Make a CPU tensor that lives in the arena, its content undefined: :func:`share` of it copies nothing.

    Parameters
    ----------
    shape
        Sizes of the dimensions.
    dtype
        Default: ``torch.get_default_dtype()``.
    timeout
        As for :func:`share`.

    Returns
    -------
    torch.Tensor
        Keeps its memory as long as it, a view of it, or a handle of it lives.

    Raises
    ------
    ArenaFullError
        As for :func:`share`.
    """
    return default_arena().empty(shape, dtype=dtype, timeout=timeout)


def attach(
    handle: SharedTensor,
    *,
    pin: Literal["auto", "require", "off"] = "auto",
    device: torch.device | str | int | None = None,
) -> None:
    """Map all of a handle's arena now, and lock its pages for a device, so that the first tensors do not pay for it.

    Parameters
    ----------
    handle
        Any handle of the arena; in the process that owns it, too.
    pin
        ``"auto"``: lock the pages for ``device``, if one is given; if that cannot be done, warn and go on without.
        ``"require"``: raise then. ``"off"``: lock no more pages of this arena in this process, also not on first use.
    device
        The device that copies will go to; with ``"require"`` the current accelerator by default.

    Raises
    ------
    DeviceError
        Pages cannot be locked, and ``pin`` is ``"require"``.
    SegmentLostError
        The arena is gone.
    TooManyPeersError
        The arena has as many processes as it takes.
    """
    if pin not in ("auto", "require", "off"):
        raise ValueError(f"pin is 'auto', 'require' or 'off', not {pin!r}")
    _core.attach(handle)
    if pin == "off":
        _core.refuse_pinning(handle)
    elif pin == "require" or device is not None:
        pin_arena(handle, device, required=pin == "require")


def discard_blob(blob: bytes | bytearray | memoryview) -> int:
    """Take back the messages in a pickle or in the result of ``to_bytes``; for :func:`shmx.discard`."""
    data = bytes(blob)
    if data.startswith(b"SX"):
        return int(_core.discard_bytes(data))
    try:
        texts = {
            argument
            for _, argument, _ in pickletools.genops(data)
            if isinstance(argument, str) and argument.startswith(_core.TEXT_PREFIX)
        }
    except Exception as error:
        raise InvalidHandleError(f"not a pickle, nor the bytes of a handle: {error}") from error
    return sum(_discard_text(text) for text in texts)


def _discard_text(text: str) -> bool:
    try:
        return _core.discard_text(text)
    except InvalidHandleError:
        return False  # a string of the user's that begins like a handle


def trim() -> int:
    """Give segments of the default arena in which no block is in use back to the system; returns how many bytes.

    One block that is held, or has loads to come, keeps all of its segment.
    """
    arena = _default
    return arena.trim() if arena is not None and not arena.closed else 0


def _log_removals() -> None:
    for removal in _core.take_removals():
        what = "removed" if removal["own"] else "reaped: its owner was gone and nobody used it"
        _logger.info("arena %s %s, %d bytes", removal["name"], what, removal["bytes"])


def gc(*, force: bool = False, dry_run: bool = False) -> list[dict[str, Any]]:
    """Remove arenas whose owners are gone and which nobody uses any more.

    Parameters
    ----------
    force
        Give up the messages of dead owners at once instead of after their time-to-live, and those of this
        process's own arena that have outlived it. Data that a live process holds is never touched.
    dry_run
        Change nothing; say what would be removed.

    Returns
    -------
    list of dict
        For each arena in /dev/shm that this process has no part in: ``name``, ``outcome`` (``"removed"``,
        ``"would be removed"``, ``"in use"``, ``"owner alive"`` or ``"not ours"``), ``reason``, and ``bytes`` of its
        files.
    """
    # What has no name the kernel removes.
    seen = {arena["name"]: arena for arena in arenas() if not arena["attached"] and arena["backend"] == "shm"}
    if dry_run:
        return [_foretold(arena, force) for arena in seen.values()]
    arena = _default
    if arena is not None and not arena.closed:
        arena.sweep(expire_messages=force)
    reports = _core.reap(force=force)
    _log_removals()
    return [_explained(report, seen.get(report["name"]), force) for report in reports]


def _foretold(arena: dict[str, Any], force: bool) -> dict[str, Any]:
    outcome, reason = prospect(arena, force=force)
    if outcome == "removed":
        outcome = "would be removed"
    return {"name": arena["name"], "outcome": outcome, "reason": reason, "bytes": arena["memory_bytes"]}


def _explained(report: dict[str, Any], seen: dict[str, Any] | None, force: bool) -> dict[str, Any]:
    outcome, reason = prospect(seen, force=force) if seen is not None else ("", "")
    # The survey and the reaper look one after the other, and others go on between them.
    if outcome != report["outcome"]:
        reason = "it changed while gc looked at it"
    size = seen["memory_bytes"] if seen is not None else report["bytes"]
    return {"name": report["name"], "outcome": report["outcome"], "reason": reason, "bytes": size}


def stats() -> dict[str, Any]:
    """What this process uses.

    Returns
    -------
    dict
        ``arena``: of the default arena, as :meth:`Arena.stats` (``None`` if not made yet). ``attached``: names of the
        arenas that this process takes part in. ``memberships``, of each of them: ``name``, ``backend``; ``loaded``,
        handles that this process has loaded, and ``stale_loads``, those that came too late; ``held_blocks`` and
        ``held_bytes``, which this process alone holds (``held_blocks`` of an arena's own numbers are held by any);
        ``owned``, its numbers as :meth:`Arena.stats` if it is this process's, else ``None``. ``pool_bytes``: private
        memory kept for materialized tensors.
        ``inline_fallbacks``: tensors that :func:`wrap` and :func:`dumps` left in their places because the arena was
        full. ``pinned``: what is page-locked for devices: ``backend`` (``"cuda"``, ``"hip"``, ``"none"``), ``bytes``,
        ``chunks``, ``milliseconds`` spent in ``registrations`` calls, ``foreign_bytes`` (registered by somebody else),
        ``quarantined_bytes`` (which could not be unregistered), ``reason`` (why something is not locked),
        ``copies_in_flight``, ``copies_lost`` (whose device failed), ``trouble`` (the driver's last strange answer).
    """
    arena = _default
    return {
        "arena": arena.stats() if arena is not None and not arena.closed else None,
        "attached": _core.attached(),
        "memberships": _core.membership_counts(),
        "pool_bytes": _core.pool_bytes(),
        "inline_fallbacks": _inline_fallbacks,
        "pinned": _core.pin_report(),
    }


def inline_fallbacks() -> int:
    """How many tensors were left in their places because the arena was full."""
    return _inline_fallbacks


def note_inline_fallback(tensors: int, error: ArenaFullError) -> None:
    """Count tensors that travel in the pickle because the arena is full; warn once."""
    global _inline_fallbacks
    with _lock:
        first = _inline_fallbacks == 0
        _inline_fallbacks += tensors
    if first:
        warnings.warn(
            f"shmx: tensors travel in the pickle, which is slow, because the arena is full: {error}. Warned once; "
            "counted in shmx.stats()['inline_fallbacks']",
            RuntimeWarning,
            stacklevel=4,
        )


def _copiers() -> ThreadPoolExecutor:
    global _executor
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="shmx-share")
        return _executor


def _forget_default() -> None:
    global _default, _executor, _lock
    _lock = threading.Lock()
    _default = None
    _executor = None  # its threads are the parent's
    _core.take_removals()  # they are the parent's to log


def _leave() -> None:
    # A child of multiprocessing joins its threads, and those of executors, only after its finalizers; they may be
    # sharing yet. What it calls then is called here already; the second call does nothing.
    threading._shutdown()  # type: ignore[attr-defined]
    _core.leave_all()
    _log_removals()


def _leave_at_exit(*_: object) -> None:
    # multiprocessing runs its finalizers at the end of the main process and of its children (which end with
    # os._exit, so atexit would miss them). The low priority comes after queues have flushed what they still pickle.
    multiprocessing.util.Finalize(None, _leave, exitpriority=-1000)


os.register_at_fork(after_in_child=_forget_default)
# A finalizer belongs to the process that made it. multiprocessing drops them all in its children, and then calls this.
os.register_at_fork(after_in_child=_leave_at_exit)
multiprocessing.util.register_after_fork(_core, _leave_at_exit)
_leave_at_exit()
