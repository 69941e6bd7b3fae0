"""Collectives of Python objects whose tensors stay out of the network inside a host.

``broadcast_object_list`` has the signature of ``torch.distributed.broadcast_object_list``. The ranks of the source's
host get handles. The bytes of the tensors cross once to every other host, point to point through the process group;
the first rank there publishes them again for its neighbours. torch.distributed is the only network engine.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import struct
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shmx._core import SharedTensor, readers
from shmx.arena import chosen_backend, discard_blob, empty, note_inline_fallback, share
from shmx.device import materialize_many
from shmx.errors import ArenaFullError, InvalidHandleError, ShmxError
from shmx.pickling import put_together, take_apart

__all__ = ["agree", "broadcast_object_list", "fan_out"]

# The first message of a broadcast is as long as this, whatever is in it: receivers cannot know better. The handles of
# about 60 tensors fit.
_FIRST_BYTES = 8 << 10
# Bytes of everything that follows.
_HEADER = struct.Struct("<Q")
_FIRST_CONTENT = _FIRST_BYTES - _HEADER.size
# Messages of a group that are remembered in case it breaks; older ones have long been loaded.
_REMEMBERED = 64


def broadcast_object_list(
    object_list: list[Any],
    src: int | None = None,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
    group_src: int | None = None,
    *,
    min_bytes: int | None = None,
    on_error: str = "raise",
) -> None:
    """Broadcast picklable objects from one rank; as ``torch.distributed.broadcast_object_list``.

    Large CPU tensors and numpy arrays in the objects, at any depth, leave the pickle as in :func:`shmx.dumps`: they are
    copied once into the arena of the source, and every rank copies them out into private, writable memory. Nothing
    waits for that, and nobody needs a barrier. Handles that are in the objects stay handles; on other hosts they are
    handles of copies. What the first rank of another host cannot publish there goes to its neighbours inline, a
    tensor in the place of a handle, and that rank warns.

    Parameters
    ----------
    object_list
        The objects to send on the source; as many of anything on the other ranks, where they are replaced.
    src
        Global rank of the source; 0 if neither this nor ``group_src`` is given.
    group
        The process group; the default group if not given. All its ranks must call. The first call asks every rank
        which host it is on, so a process must not take the place of another one in the same group (elastic groups).
    device
        Where the messages of the collective live; by default the current accelerator for a group that has no CPU
        backend.
    group_src
        Rank of the source in ``group``, instead of ``src``.
    min_bytes
        Tensors of so many bytes and more leave the pickle; 64 KiB, or ``SHMX_MIN_BYTES``. While an arena is full they
        travel inline, counted and warned of as for :func:`shmx.wrap`.
    on_error
        What becomes of an object that cannot be restored on this rank. ``"raise"``: its error is raised once the
        others have been restored. ``"return"``: the error takes its place, without traceback; see :func:`agree`.

    Raises
    ------
    ValueError
        The source sent another number of objects than this rank has room for; ``on_error`` is neither of the two.
    SegmentLostError, TooManyPeersError
        Somebody removed the arena meanwhile; 64 processes use it.
    RuntimeError
        A rank is gone, from torch.distributed. Messages of this group that were announced and not loaded are given up,
        as after whatever else goes wrong on the way.
    """
    if on_error not in ("raise", "return"):
        raise ValueError(f"on_error={on_error!r} is neither 'raise' nor 'return'")
    group = _group(group)
    if src is not None and group_src is not None:
        raise ValueError("give src, a global rank, or group_src, a rank in the group, not both")
    rank = dist.get_rank(group)
    if rank < 0:
        return
    if group_src is None:
        group_src = dist.get_group_rank(group, src or 0)
    channel = _Channel(group, device)
    if rank == group_src:
        _send(channel, object_list, min_bytes)
        return
    sent = _receive(channel, group_src)
    if len(sent) != len(object_list):
        raise ValueError(
            f"rank {group_src} broadcast {len(sent)} objects, this rank has room for {len(object_list)}; "
            "give lists of equal length"
        )
    failure: Exception | None = None
    for index in range(len(sent)):
        try:
            object_list[index] = sent[index]()
        # Whatever an object raises when it is restored is that object's failure.
        except Exception as error:
            # They refer to all handles of the broadcast, and live as long as the error.
            traceback.clear_frames(error.__traceback__)
            object_list[index] = error if on_error == "raise" else error.with_traceback(None)
            if failure is None:
                failure = error
    sent.clear()
    try:
        if failure is not None and on_error == "raise":
            raise failure
    finally:
        # Else the error refers to this frame, and the frame to the error.
        del failure, object_list


def agree(
    failed: Sequence[bool], group: dist.ProcessGroup | None = None, device: torch.device | str | None = None
) -> list[bool]:
    """Which requests have failed on any rank: one reduction, the same answer everywhere.

    Parameters
    ----------
    failed
        For each request whether it has failed on this rank; all ranks give lists of equal length.
    group, device
        As of :func:`broadcast_object_list`.

    Returns
    -------
    list of bool
        For each request whether it has failed on any rank of the group.

    Raises
    ------
    ValueError
        This rank is not in the group.
    RuntimeError
        A rank is gone, from torch.distributed.
    """
    group = _group_of_this_rank(group)
    mask = torch.tensor([bool(one) for one in failed], dtype=torch.int32, device=_device(group, device))
    if mask.numel():
        dist.all_reduce(mask, op=dist.ReduceOp.MAX, group=group)
    return [one != 0 for one in mask.tolist()]


def fan_out(
    handles: Sequence[SharedTensor],
    device: torch.device | str | int,
    group: dist.ProcessGroup | None = None,
) -> list[torch.Tensor]:
    """Copy shared tensors to one device and broadcast them from there to those of the other ranks.

    One transfer over the link between host and devices, whatever the number of ranks; the rest goes through the
    process group. By itself every rank copies over its own link, which is faster where the links are many and the
    ranks that want the same tensors few.

    Parameters
    ----------
    handles
        The same tensors in the same order on every rank. On all ranks but the first they need not have data: what the
        first rank has is received.
    device
        Where to put the tensors of this rank; the backend of the group for it is used.
    group
        The process group; the default group if not given. All its ranks must call.

    Returns
    -------
    list of torch.Tensor
        Contiguous tensors on ``device`` that the caller owns, in the order of ``handles``. They may be used on the
        current stream at once.

    Raises
    ------
    DeviceError, StaleHandleError, SegmentLostError, ReleasedError, InvalidHandleError
        Why this rank has no tensors. When any rank cannot take part, all ranks copy for themselves, so that no rank
        waits for another one, and only those raise that cannot do that either.
    ValueError
        This rank is not in the group.
    RuntimeError
        A rank is gone, from torch.distributed.

    Notes
    -----
    Before the broadcast the ranks agree that each of them can take part. Where the group has a CPU backend beside that
    of the device (``"cpu:gloo,cuda:nccl"``) they do so without waiting for the device.
    """
    group = _group_of_this_rank(group)
    leads = dist.get_rank(group) == 0
    tensors: list[torch.Tensor] = []
    failure: Exception | None = None
    try:
        tensors = materialize_many(handles, device) if leads else _room_for(handles, device)
    except Exception as error:
        failure = error
    try:
        if any(agree([failure is not None], group)):
            if failure is not None:
                raise failure
            return tensors if leads else materialize_many(handles, device)
    finally:
        # Else the error refers to this frame, which has the handles, and the frame to the error.
        del failure
    works = [
        dist.broadcast(_bytes_of(tensor), group_src=0, group=group, async_op=True)
        for tensor in tensors
        if tensor.nbytes
    ]
    for work in works:
        work.wait()
    return tensors


def _room_for(handles: Sequence[SharedTensor], device: torch.device | str | int) -> list[torch.Tensor]:
    return [torch.empty(handle.shape, dtype=handle.dtype, device=device) for handle in handles]


# ---- groups ----


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = group if group is not None else dist.group.WORLD
    if group is None:
        raise ValueError("torch.distributed is not initialized; call init_process_group first")
    return group


def _group_of_this_rank(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = _group(group)
    if dist.get_rank(group) < 0:
        raise ValueError("this rank is not in the group; let only its ranks call")
    return group


@dataclass(frozen=True)
class _Hosts:
    """Which ranks of a group are on which host, by rank in the group."""

    ranks: tuple[tuple[int, ...], ...]

    def neighbours(self, rank: int) -> tuple[int, ...]:
        """All ranks on the host of ``rank``, in order."""
        return next(host for host in self.ranks if rank in host)

    def leaders(self, source: int) -> list[int]:
        """The first rank of every host that is not the source's."""
        return [host[0] for host in self.ranks if source not in host]


def _host() -> tuple[Any, ...]:
    """What processes have in common that can open each other's segments."""
    shm = os.stat("/dev/shm")
    # Segments without names are opened through /proc.
    processes = os.readlink("/proc/self/ns/pid") if chosen_backend() != "shm" else None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, shm.st_dev, shm.st_ino, os.geteuid(), processes


class _Known:
    """What this process knows of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, _host(), group=group)
        ranks: dict[Any, list[int]] = {}
        for rank, host in enumerate(everyone):
            ranks.setdefault(host, []).append(rank)
        self.hosts = _Hosts(tuple(tuple(host) for host in ranks.values()))
        self.sent: deque[bytes] = deque(maxlen=_REMEMBERED)


# Values that referred to their group would keep it alive, with its sockets and threads.
_known: weakref.WeakKeyDictionary[dist.ProcessGroup, _Known] = weakref.WeakKeyDictionary()


class _Channel:
    """One call's way to the other ranks of a group."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device | str | None) -> None:
        self.group = group
        self.device = _device(group, device)
        self.rank = dist.get_rank(group)
        if group not in _known:
            _known[group] = _Known(group)
        self.hosts = _known[group].hosts
        self._sent = _known[group].sent

    def announce(self, handles: Sequence[SharedTensor | None], loads: int) -> bytes:
        """A pickle of handles that so many ranks will load; nothing if there are none."""
        if not loads or not handles:
            return b""
        with readers(loads):
            blob = pickle.dumps(handles)
        self._sent.append(blob)
        return blob

    @contextlib.contextmanager
    def unbroken(self) -> Iterator[None]:
        """Take back what the ranks of a group that breaks in here, for whatever reason, will not load."""
        try:
            yield
        except Exception:
            while self._sent:
                discard_blob(self._sent.pop())
            raise

    def broadcast(self, content: bytes) -> None:
        """Send bytes from this rank to all: one collective if they are few."""
        first = torch.empty(_FIRST_BYTES, dtype=torch.uint8, device="cpu")
        head = _HEADER.pack(len(content)) + content[:_FIRST_CONTENT]
        first[: len(head)] = _tensor_of(head)
        self._broadcast(first, self.rank)
        if len(content) > _FIRST_CONTENT:
            self._broadcast(_tensor_of(content[_FIRST_CONTENT:]), self.rank)

    def take_broadcast(self, source: int) -> memoryview:
        """The bytes that the source broadcasts."""
        first = self._broadcast(torch.empty(_FIRST_BYTES, dtype=torch.uint8, device="cpu"), source).numpy().data
        (size,) = _HEADER.unpack_from(first)
        content = first[_HEADER.size :]
        if size <= _FIRST_CONTENT:
            return content[:size]
        rest = self._broadcast(torch.empty(size - _FIRST_CONTENT, dtype=torch.uint8, device="cpu"), source)
        return memoryview(b"".join((content, rest.numpy().data)))

    def _broadcast(self, data: torch.Tensor, source: int) -> torch.Tensor:
        moved = data.to(self.device)
        dist.broadcast(moved, group_src=source, group=self.group)
        return moved.cpu()

    def send(self, tensors: Sequence[torch.Tensor], to: Sequence[int]) -> None:
        """Send the bytes of tensors to each of some ranks; for an empty one nothing is sent or received."""
        moved = [_bytes_of(tensor).to(self.device) for tensor in tensors if tensor.nbytes]
        works: list[Any] = [dist.isend(one, group_dst=rank, group=self.group) for rank in to for one in moved]
        for work in works:
            work.wait()

    def receive_into(self, data: torch.Tensor, source: int) -> None:
        """Receive the bytes of a contiguous tensor."""
        if not data.nbytes:
            return
        flat = _bytes_of(data)
        moved = flat if self.device.type == "cpu" else torch.empty_like(flat, device=self.device)
        dist.recv(moved, group_src=source, group=self.group)
        if moved is not flat:
            flat.copy_(moved)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _tensor_of(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _device(group: dist.ProcessGroup, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    # "cpu:gloo,cuda:nccl", or the name of a backend.
    backend = str(dist.get_backend_config(group))
    accelerator = torch.accelerator.current_accelerator()
    if "cpu:" in backend or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


# ---- the source ----


class _Numbered(pickle.Pickler):
    """Pickles with numbers in the places of handles."""

    def __init__(self, stream: io.BytesIO, handles: list[SharedTensor]) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        numbers: dict[int, int] = {}

        def reduce(handle: SharedTensor) -> tuple[Any, tuple[int]]:
            number = numbers.setdefault(id(handle), len(handles))
            if number == len(handles):
                handles.append(handle)
            return _handle, (number,)

        table: dict[type, Any] = {SharedTensor: reduce}
        self.dispatch_table = {**copyreg.dispatch_table, **table}


def _handle(number: int) -> Any:
    """Stands in a pickle for a handle that travels beside it; the unpickler answers this name itself."""
    raise InvalidHandleError(f"handle {number} travelled beside this pickle, which shmx.distributed alone can load")


def _send(channel: _Channel, objects: Sequence[Any], min_bytes: int | None) -> None:
    handles: list[SharedTensor] = []
    streams = []
    for value in objects:
        stream = io.BytesIO()
        _Numbered(stream, handles).dump(take_apart(value, min_bytes))
        streams.append(stream.getvalue())
    neighbours = channel.hosts.neighbours(channel.rank)
    leaders = channel.hosts.leaders(channel.rank)
    local = channel.announce(handles, len(neighbours) - 1)
    # What is told to other hosts must be what is sent to them, whoever revokes a block meanwhile.
    views = [_view(handle) for handle in handles] if leaders else []
    abroad = [
        handle if view is None else (handle.shape, handle.dtype) for handle, view in zip(handles, views, strict=False)
    ]
    content = pickle.dumps((streams, len(handles), local, abroad), pickle.HIGHEST_PROTOCOL)
    with channel.unbroken():
        channel.broadcast(content)
        channel.send([view for view in views if view is not None], leaders)


def _view(handle: SharedTensor) -> torch.Tensor | None:
    """The tensor of a handle that has data."""
    try:
        return handle.view()
    except ShmxError:
        return None


# ---- the other ranks ----


class _Unshared:
    """What stands for a handle where there is no room for its bytes in shared memory."""

    error = None
    is_available = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def materialize(self, device: object = None) -> torch.Tensor:
        """The tensor, which every process has for itself."""
        return self.tensor


class _Unpickler(pickle.Unpickler):
    """Restores what :class:`_Numbered` has pickled."""

    handles: Sequence[SharedTensor | _Unshared]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, _handle.__name__):
            return self.handles.__getitem__
        return super().find_class(module, name)


class _Load:
    """One object, to be restored."""

    def __init__(self, stream: bytes, handles: Sequence[SharedTensor | _Unshared]) -> None:
        self._stream = stream
        self._handles = handles

    def __call__(self) -> Any:
        unpickler = _Unpickler(io.BytesIO(self._stream))
        unpickler.handles = self._handles
        shared, own, order, data = unpickler.load()
        own = [handle.tensor if isinstance(handle, _Unshared) else handle for handle in own]
        return put_together((shared, own, order, data))


def _receive(channel: _Channel, source: int) -> list[_Load]:
    with channel.unbroken():
        streams, count, local, abroad = pickle.loads(channel.take_broadcast(source))
        handles = _receive_handles(channel, source, local, abroad) if count else []
    return [_Load(stream, handles) for stream in streams]


# For ranks on other hosts: what to make room for, or a handle that has no data and says why.
_Abroad = Sequence[tuple[tuple[int, ...], torch.dtype] | SharedTensor]


def _receive_handles(channel: _Channel, source: int, local: bytes, abroad: _Abroad) -> list[SharedTensor | _Unshared]:
    neighbours = channel.hosts.neighbours(channel.rank)
    if source in neighbours:
        handles: list[SharedTensor | _Unshared] = pickle.loads(local)
        return handles
    if channel.rank == neighbours[0]:
        return _republish(channel, source, neighbours[1:], abroad)
    return _take_over(channel, neighbours[0], abroad)


def _republish(
    channel: _Channel, source: int, others: Sequence[int], abroad: _Abroad
) -> list[SharedTensor | _Unshared]:
    """Receive the bytes from another host and publish them on this one."""
    handles = [_receive_tensor(channel, source, *one) if isinstance(one, tuple) else one for one in abroad]
    blob = channel.announce([None if isinstance(one, _Unshared) else one for one in handles], len(others))
    if others:
        inline = [one.tensor for one in handles if isinstance(one, _Unshared)]
        channel.send([torch.tensor([len(blob)], device="cpu"), _tensor_of(blob), *inline], others)
    return handles


def _receive_tensor(
    channel: _Channel, source: int, shape: tuple[int, ...], dtype: torch.dtype
) -> SharedTensor | _Unshared:
    # It has been sent, so it must be received whatever happens here, and passed on to those that wait for it.
    try:
        memory = empty(shape, dtype=dtype)
    except Exception:
        # `share` says why.
        memory = torch.empty(shape, dtype=dtype, device="cpu")
    channel.receive_into(memory, source)
    try:
        return share(memory)
    except ArenaFullError as error:
        note_inline_fallback(1, error)
    except Exception as error:
        warnings.warn(
            f"shmx: tensors from rank {source} are passed on to the other ranks of this host inline, which is slow, "
            f"because they cannot be published: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=6,
        )
    return _Unshared(memory)


def _take_over(channel: _Channel, leader: int, abroad: _Abroad) -> list[SharedTensor | _Unshared]:
    """What the first rank of this host has published, or sends inline."""
    size = torch.empty(1, dtype=torch.int64, device="cpu")
    channel.receive_into(size, leader)
    blob = torch.empty(int(size.item()), dtype=torch.uint8, device="cpu")
    channel.receive_into(blob, leader)
    handles: list[Any] = pickle.loads(blob.numpy().data)
    for number, one in enumerate(abroad):
        if handles[number] is None and isinstance(one, tuple):
            memory = torch.empty(one[0], dtype=one[1], device="cpu")
            channel.receive_into(memory, leader)
            handles[number] = _Unshared(memory)
    return handles
