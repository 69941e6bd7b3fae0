"""The opponent of the demonstration: one fresh shared-memory segment per tensor and message.

Written from the described behaviour of the class that SGLang pull request #21465 introduced for image features.
Publishing creates a segment and copies the tensor into it; a pickle carries name, shape and dtype; unpickling opens
the segment; materializing clones, closes and unlinks. Its losses are part of the behaviour: nobody counts the
readers, so the first rank that materializes removes the name, and a rank that unpickles later finds nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import torch

__all__ = ["SegmentTensor", "remove_left"]

SHM = Path("/dev/shm")


class SegmentTensor:
    """A CPU tensor in a shared-memory segment of its own.

    Parameters
    ----------
    tensor : torch.Tensor
        Contiguous CPU tensor; it is copied.
    name : str
        Name of the new segment. Unlike a random name it lets the caller find what a run has left behind.

    Raises
    ------
    FileNotFoundError
        By ``pickle.loads``, if a rank that was faster has materialized, and so unlinked, the segment.
    """

    def __init__(self, tensor: torch.Tensor, *, name: str) -> None:
        """Create the segment and copy the tensor into it."""
        self._name = name
        self._shape = tensor.shape
        self._dtype = tensor.dtype
        self._segment: shared_memory.SharedMemory | None = None
        segment = shared_memory.SharedMemory(name=name, create=True, size=max(1, tensor.nbytes))
        try:
            self._tensor_in(segment).copy_(tensor)
        finally:
            segment.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return what travels: no data."""
        return {"name": self._name, "shape": self._shape, "dtype": self._dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the segment."""
        self._name = state["name"]
        self._shape = state["shape"]
        self._dtype = state["dtype"]
        self._segment = _attach(self._name)

    def materialize(self) -> torch.Tensor:
        """Return an owned copy, and unlink the segment for everybody.

        Returns
        -------
        torch.Tensor
            CPU tensor in private memory.

        Raises
        ------
        FileNotFoundError
            If this object was not unpickled, or has been materialized before.
        """
        segment, self._segment = self._segment, None
        if segment is None:
            raise FileNotFoundError(f"segment {self._name} is not open here")
        owned = self._tensor_in(segment).clone()
        segment.close()
        _unlink(self._name)
        return owned

    def view(self) -> torch.Tensor:
        """Return a tensor over the segment of an unpickled object; it must be gone before `close`.

        Raises
        ------
        FileNotFoundError
            If this object is not open.
        """
        if self._segment is None:
            raise FileNotFoundError(f"segment {self._name} is not open here")
        return self._tensor_in(self._segment)

    def close(self) -> None:
        """Unmap, without unlinking: for callers that count the readers themselves."""
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()

    def unlink(self) -> None:
        """Remove the name, if it is still there."""
        _unlink(self._name)

    def _tensor_in(self, segment: shared_memory.SharedMemory) -> torch.Tensor:
        numel = self._shape.numel()
        if numel == 0:
            return torch.empty(self._shape, dtype=self._dtype)
        return torch.frombuffer(segment.buf, dtype=self._dtype, count=numel).view(self._shape)


def remove_left(prefix: str) -> list[str]:
    """Unlink the segments that nobody has materialized.

    Parameters
    ----------
    prefix : str
        What their names begin with.

    Returns
    -------
    list of str
        The names that were left.
    """
    left = sorted(path.name for path in SHM.glob(f"{prefix}*"))
    for name in left:
        _unlink(name)
    return left


def _unlink(name: str) -> None:
    try:
        (SHM / name).unlink()
    except FileNotFoundError:
        # Another process was faster.
        return
    resource_tracker.unregister(f"/{name}", "shared_memory")


# All processes of a run share one resource tracker: the creator registers a name there, whoever removes the name
# takes it off again, and what nobody removed the tracker unlinks at the end. Python before 3.13 registers in every
# process that attaches as well; such an entry may arrive after the name was taken off, and the tracker would then
# complain on the terminal about a segment that is long gone.
if sys.version_info >= (3, 13):

    def _attach(name: str) -> shared_memory.SharedMemory:
        return shared_memory.SharedMemory(name=name, track=False)

else:

    def _attach(name: str) -> shared_memory.SharedMemory:
        with _registration_off():
            return shared_memory.SharedMemory(name=name)

    @contextlib.contextmanager
    def _registration_off() -> Iterator[None]:
        # Not safe beside other threads that create segments; the ranks of the demonstration have none.
        register = resource_tracker.register
        resource_tracker.register = lambda name, rtype: None
        try:
            yield
        finally:
            resource_tracker.register = register
