"""Ray's object store: NumPy arrays, which consumers read without a copy. Its daemons run beside all other transports.

For that reason it takes part only where it is named.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
import ray.cloudpickle
import torch

from . import interface

__all__ = ["Consumer", "Producer"]


class Producer(interface.Producer):
    """Starts Ray; puts one object per message."""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        room = max(512 << 20, 4 * sum(plan.sizes))
        context = ray.init(
            include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=1, object_store_memory=room
        )
        self._address: str = context.address_info["gcs_address"]
        self._messages: deque[Any] = deque()

    def handle(self) -> Any:
        """Where the cluster is."""
        return self._address

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """One copy, into the store."""
        self._messages.append(ray.put([tensor.numpy() for tensor in tensors]))
        return [[ray.cloudpickle.dumps(self._messages[-1])]] * self.plan.consumers

    def recycle(self) -> None:
        """Drop the reference."""
        self._messages.popleft()

    def close(self) -> None:
        """Stop Ray."""
        self._messages.clear()
        ray.shutdown()


class Consumer(interface.Consumer):
    """A driver of its own on the same cluster."""

    def __init__(self, plan: interface.Plan, handle: Any, index: int) -> None:
        super().__init__(plan, handle, index)
        ray.init(address=handle, log_to_driver=False, logging_level="ERROR")

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Read-only arrays in the store."""
        arrays = ray.get(ray.cloudpickle.loads(bytes(frames[0])))
        return [torch.from_numpy(array) for array in arrays]

    def close(self) -> None:
        """Leave the cluster."""
        ray.shutdown()
