"""iceoryx2: one loaned sample per message, the tensors one after the other at multiples of 64 bytes.

The ZMQ message only says that there is a sample, so that all transports wake their consumers in the same way. Both
sides know the sizes beforehand: a slice of bytes does not describe what is in it, see `iceoryx2_described`.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

import iceoryx2
import torch

from . import interface

__all__ = ["Consumer", "Producer"]

_ALIGNMENT = 64


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where each tensor begins, and the end of the last."""
    return [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]


def _service(plan: interface.Plan) -> tuple[Any, Any]:
    iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
    node = iceoryx2.NodeBuilder.new().create(iceoryx2.ServiceType.Ipc)
    builder = node.service_builder(iceoryx2.ServiceName.new(plan.name))
    service = (
        builder.publish_subscribe(iceoryx2.Slice[ctypes.c_uint8])
        .max_publishers(1)
        .max_subscribers(plan.consumers)
        .max_nodes(plan.consumers + 1)
        .subscriber_max_buffer_size(plan.in_flight)
        .subscriber_max_borrowed_samples(plan.in_flight)
        .payload_alignment(iceoryx2.Alignment.new(_ALIGNMENT))
        .open_or_create()
    )
    return node, service


class Producer(interface.Producer):
    """Loans, copies, sends."""

    def __init__(self, plan: interface.Plan) -> None:
        super().__init__(plan)
        self._offsets = _offsets(plan.sizes)
        self._node, self._service = _service(plan)
        self._publisher = (
            self._service.publisher_builder().initial_max_slice_len(self._offsets[-1]).max_loaned_samples(1).create()
        )

    def put(self, tensors: Sequence[torch.Tensor]) -> Sequence[interface.Frames]:
        """One memcpy per tensor."""
        sample = self._publisher.loan_slice_uninit(self._offsets[-1])
        start = sample.payload_ptr
        for tensor, offset in zip(tensors, self._offsets, strict=False):
            ctypes.memmove(start + offset, tensor.data_ptr(), tensor.nbytes)
        sample.assume_init().send()
        return [[b""]] * self.plan.consumers

    def close(self) -> None:
        """Ports before the service, the service before the node."""
        del self._publisher
        del self._service
        del self._node


class Consumer(interface.Consumer):
    """Holds a sample as long as its tensors."""

    def __init__(self, plan: interface.Plan, handle: Any, index: int) -> None:
        super().__init__(plan, handle, index)
        self._offsets = _offsets(plan.sizes)
        self._node, self._service = _service(plan)
        self._subscriber = self._service.subscriber_builder().create()
        self._samples: deque[Any] = deque()

    def open(self, frames: interface.Frames) -> list[torch.Tensor]:
        """Zero-copy views."""
        payload = self._receive()
        return [
            torch.frombuffer(payload, dtype=torch.float32, count=size // 4, offset=offset)
            for size, offset in zip(self.plan.sizes, self._offsets, strict=False)
        ]

    def _receive(self) -> Any:
        """Bytes of the next sample, which is kept until `done`."""
        sample = self._subscriber.receive()
        self._samples.append(sample)
        return (ctypes.c_uint8 * self._offsets[-1]).from_address(sample.payload_ptr)

    def done(self) -> None:
        """Give the sample back."""
        self._samples.popleft().delete()

    def close(self) -> None:
        """As for the producer."""
        self._samples.clear()
        del self._subscriber
        del self._service
        del self._node
