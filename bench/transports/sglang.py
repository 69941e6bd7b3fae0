"""``ShmPointerMMData`` of the installed SGLang: a fresh segment per tensor, mapped copy-on-write when it is owned.

Its owned tensors are private mappings whose copy is made page by page when they are written to, and whose pages are
mapped when they are read; `own` is therefore no work done, and only the question `broadcast`, which reads everything,
compares it.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from . import interface
from .partial_import import import_only

__all__ = ["Consumer", "Producer", "pointer_class"]


def pointer_class() -> Any:
    """The class, from the installed package; its engine is not imported."""
    module, _ = import_only("sglang", ["sglang.srt.managers.mm_utils", "sglang.srt.utils.stale_shm_cleanup"])
    return module.ShmPointerMMData


class Producer(interface.Producer):
    """Wraps as the tokenizer process does."""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        self._class = pointer_class()

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """Reserve a segment per tensor, copy."""
        return [[pickle.dumps([self._class(tensor) for tensor in tensors])]] * self.plan.consumers


class Consumer(interface.Consumer):
    """Opens as a scheduler rank does; unlinks after everybody has opened, which is where SGLang has a barrier."""

    def __init__(self, plan: interface.Plan, handle: Any, index: int) -> None:
        super().__init__(plan, handle, index)
        pointer_class()
        self._opened: deque[list[Any]] = deque()

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """The tensors that unpickling has mapped."""
        self._opened.append(pickle.loads(frames[0]))
        return [pointer.tensor for pointer in self._opened[-1]]

    def own(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Not offered here, see above."""
        raise NotImplementedError("its owned tensors are copied when they are used; see the question broadcast")

    def done(self) -> None:
        """Unmap and unlink; the first one succeeds."""
        for pointer in self._opened.popleft():
            pointer.close_and_unlink()
