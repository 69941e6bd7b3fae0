"""The errors of shmx. Every message names the segment, what happened, and the remedy."""

__all__ = [
    "ArenaFullError",
    "DeviceError",
    "ForeignHostError",
    "InvalidHandleError",
    "ReleasedError",
    "SegmentLostError",
    "ShmxError",
    "StaleHandleError",
    "SystemCallError",
    "TooManyPeersError",
]


class ShmxError(Exception):
    """Base class of all errors that shmx raises about shared tensors."""


class ArenaFullError(ShmxError, OSError):
    """Capacity, /dev/shm or the memory cgroup is exhausted (``errno`` is ``ENOSPC``)."""


class SegmentLostError(ShmxError, FileNotFoundError):
    """The arena is gone: its owner cleaned up, or somebody removed its files."""


class ForeignHostError(SegmentLostError):
    """The handle was made on another host or in another /dev/shm."""


class StaleHandleError(ShmxError, LookupError):
    """The block was reused or revoked after the handle was made."""


class ReleasedError(ShmxError, ValueError):
    """A handle was used after its release, or an arena after its close."""


class InvalidHandleError(ShmxError, ValueError):
    """A pickle state or ``to_bytes`` string that is damaged, hostile, or of another version."""


class TooManyPeersError(ShmxError, OSError):
    """No free peer slot in the arena (``errno`` is ``EUSERS``)."""


class DeviceError(ShmxError, RuntimeError):
    """A device driver call failed."""


class SystemCallError(ShmxError, OSError):
    """A system call failed for a reason that has no class of its own; ``errno`` says which."""
