// The docstrings of the Python classes that are written in C++.
#pragma once

namespace shmx::doc {

inline constexpr const char* kSharedTensor = R"(A published tensor: small, picklable, never the data itself.

Made by :func:`shmx.share`, and by unpickling. It holds its block, so the bytes stay as they are, until it is released
or collected. Pickling never copies bytes and never fails because the data is gone; neither does unpickling: the
handle then carries the reason (:attr:`error`), and :meth:`view` and :meth:`materialize` raise it.

Also a context manager that releases it, and a source for ``numpy.asarray`` and ``torch.from_dlpack`` (zero-copy).)";

inline constexpr const char* kView = R"(Return a zero-copy CPU tensor of the shared pages.

Returns
-------
torch.Tensor
    Of this handle's shape and dtype. Read-only by contract: every process sees the same bytes, and with
    ``SHMX_READONLY=1`` a write is a fault. It and every alias of it keep the block, also after :meth:`release`.

Raises
------
StaleHandleError, SegmentLostError, ForeignHostError, TooManyPeersError, ReleasedError
    Why there is no data.

Notes
-----
To copy to a device use :meth:`materialize`. Once the pages are locked for a device, ``view.to(device,
non_blocking=True)`` returns before they have been read, and nothing but the view keeps the block: keep the view until
the stream is done with it. And a driver may refuse to copy what spans two registrations (an arena that has grown,
``SHMX_PIN_BYTES``), where ``materialize`` makes two copies.)";

inline constexpr const char* kMaterialize = R"(Copy the tensor into memory that the caller owns.

Parameters
----------
device : torch.device or str or int, optional
    Where to. Without it: private, writable, contiguous CPU memory from a recycled pool (``SHMX_POOL_BYTES``, at most
    1 GiB kept by default, given back after 10 s without use).
stream : torch.Stream, optional
    The device stream to copy on; by default the current one.
non_blocking : bool
    Let the copy run behind the call where source and device allow it.

Returns
-------
torch.Tensor
    Of this handle's shape and dtype. It holds nothing in shared memory; this handle goes on holding its block.

Raises
------
The same as :meth:`view`; ``MemoryError``.
DeviceError
    The copy to the device failed, or its stream is capturing a graph.)";

inline constexpr const char* kMaterializeInto = R"(Copy the tensor into ``dst`` and return ``dst``.

Parameters
----------
dst : torch.Tensor
    Of the same shape and dtype, of any strides, on any device; written in place.

Raises
------
ValueError
    Shape or dtype differ.
TypeError
    ``dst`` is not a tensor.
The same as :meth:`view`.)";

inline constexpr const char* kRelease = R"(Give up this handle's hold. Idempotent; views keep their own.

Afterwards :meth:`view` raises ``ReleasedError``, and a pickle of the handle carries that reason.)";

inline constexpr const char* kRevoke = R"(Make every handle of this block stale at once and take its messages back.

For a request that was aborted. Only in the process that owns the arena. Processes that hold the block already keep
reading it; its memory is used again after the last of them. Releases this handle.

Raises
------
ReleasedError
    This process does not own the arena, or the arena is closed.)";

inline constexpr const char* kWithReaders =
    R"(Return a handle of the same block whose pickles announce ``n`` loads each.

For what is pickled elsewhere (queues with feeder threads, executors). Wins over ``with shmx.readers(...)``.

Parameters
----------
n : int
    0 to 4095; 0 announces nothing.)";

inline constexpr const char* kToBytes = R"(Return the handle in the written, versioned format of csrc/DESIGN.md.

The same as a pickle, for other carriers and other languages; it announces loads as a pickle does.

Parameters
----------
readers : int, optional
    How often the message will be loaded, 0 to 4095. Wins over :meth:`with_readers` and :class:`shmx.readers`, and
    is not taken back if a ``with shmx.readers(...)`` around it raises; :func:`shmx.discard` does that.)";

inline constexpr const char* kFromBytes = R"(Load what :meth:`to_bytes` returned: one load of that message.

Raises
------
InvalidHandleError
    The bytes are damaged, hostile, or of another format version.)";

inline constexpr const char* kShare = R"(Publish a tensor in this arena; as :func:`shmx.share`.)";

inline constexpr const char* kShareMany =
    R"(Publish tensors that travel together in this arena; as :func:`shmx.share_many`.)";

inline constexpr const char* kTryShare = R"(Publish a tensor if that takes neither a system call nor a wait.

Returns
-------
SharedTensor or None
    ``None`` if the arena has to grow for it, or another thread is at it: :meth:`share` does that.

Raises
------
TypeError, ReleasedError
    As for :meth:`share`.)";

inline constexpr const char* kTrim =
    R"(Give segments in which no block is in use back to the system; returns how many bytes.

One block that is held, or has loads to come, keeps all of its segment.)";

inline constexpr const char* kSweep = R"(Take back the holds of dead processes; returns of how many.

Done without being asked, too, when the arena needs room.

Parameters
----------
expire_messages : bool
    Give up messages that have outlived their time-to-live, too.)";

inline constexpr const char* kStats = R"(What this arena has and has done.

Returns
-------
dict
    ``name``, ``backend``, ``capacity``; ``reserved_bytes`` (taken from the system) and ``peak_reserved_bytes``;
    ``bytes_in_use`` (of blocks that any process holds, or that have loads to come), ``largest_free_bytes`` (the
    largest piece of reserved memory without a block), ``numa_node`` (of its first memory, if known); ``segments``;
    ``blocks`` (in use or kept to be used again) and ``peak_block_bytes`` (the most bytes of all of them);
    ``held_blocks`` (held by any process), ``holders`` (processes that hold one), ``messages`` (with loads to come);
    and counts: ``published`` and, of these, ``reused`` blocks handed out, ``dead_peers_swept``,
    ``expired_messages``, ``revoked``.)";

inline constexpr const char* kReaders =
    R"(Say how often a pickle will be loaded: ``with shmx.readers(n): pickle.dumps(obj)``.

Every handle pickled inside, in this thread and task, is announced for ``n`` loads, and its data outlives all of them
without any barrier between the ranks. Count the loads of this pickle only: a source that keeps its own object does not
load. Without this, a pickle announces one load, and its block rests for ``reuse_delay`` after its last release before
it is used again. An inner call replaces the outer one; if the block raises, its messages are taken back.

Parameters
----------
n : int
    0 to 4095; 0 announces nothing: a load then succeeds as long as the block was not reused.)";

}  // namespace shmx::doc
