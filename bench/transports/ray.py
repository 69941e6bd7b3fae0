"""Ray's object store: NumPy arrays, which consumers read without a copy. Its daemons run beside all other transports.

For that reason it takes part only where it is named.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from . import interface

__all__ = ["Consumer", "Producer"]


def _ray(token: str) -> Any:
    """Import Ray with a token that this run alone has; Ray would make one and keep it in the home directory."""
    # Ray reads them when it is imported.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, RAY_USAGE_STATS_ENABLED="0")
    import ray
    import ray.cloudpickle

    return ray


class Producer(interface.Producer):
    """Starts Ray; puts one object per message."""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        token = secrets.token_hex(32)
        self._ray = _ray(token)
        room = max(512 << 20, 4 * sum(plan.sizes))
        context = self._ray.init(
            include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=1, object_store_memory=room
        )
        self._cluster: tuple[str, str] = context.address_info["gcs_address"], token
        self._messages: deque[Any] = deque()

    def handle(self) -> Any:
        """Where the cluster is, and its token."""
        return self._cluster

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """One copy, into the store."""
        self._messages.append(self._ray.put([tensor.numpy() for tensor in tensors]))
        return [[self._ray.cloudpickle.dumps(self._messages[-1])]] * self.plan.consumers

    def recycle(self) -> None:
        """Drop the reference."""
        self._messages.popleft()

    def close(self) -> None:
        """Stop Ray."""
        self._messages.clear()
        self._ray.shutdown()


class Consumer(interface.Consumer):
    """A driver of its own on the same cluster."""

    def __init__(self, plan: interface.Plan, handle: Any, index: int) -> None:
        super().__init__(plan, handle, index)
        # Nobody writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        address, token = handle
        self._ray = _ray(token)
        self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Read-only arrays in the store."""
        arrays = self._ray.get(self._ray.cloudpickle.loads(bytes(frames[0])))
        return [torch.from_numpy(array) for array in arrays]

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()
