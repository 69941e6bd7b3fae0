"""One rank copies to its device and broadcasts from there; the others receive."""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import shmx
from tests import fakegpu
from tests.blocks import messages
from tests.children import BOUND, Children
from tests.fakegpu import NAME, FakeDriver
from tests.forkserver import preloaded
from tests.patterns import is_pattern, pattern

RANKS = 3
MIB = 1 << 20
FAKE = torch.device("privateuseone", 0)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with preloaded("tests.test_device_fanout"):
        yield


class Staged(dist.ProcessGroup):
    """Collectives of the fake device, through gloo."""

    def __init__(self, gloo: dist.ProcessGroup, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._gloo = gloo
        self.broadcast_bytes = 0

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        near = [tensor.cpu() for tensor in tensors]
        work = self._gloo.broadcast(near, opts)
        work.wait()
        for tensor, received in zip(tensors, near, strict=True):
            tensor.copy_(received)
            self.broadcast_bytes += tensor.nbytes
        return work

    def allreduce(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        return self._gloo.allreduce(tensors, opts)

    def barrier(self, opts: Any) -> Any:
        return self._gloo.barrier(opts)


def staged(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> Staged:
    return Staged(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)


@dataclass
class Request:
    images: list[Any]
    mask: Any


def on_rank(
    connection: Connection, folder: str, libraries: tuple[str, str], rank: int, work: Callable[..., Any], blob: bytes
) -> Any:
    gpu = fakegpu.use(*map(Path, libraries))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.Backend.register_backend("staged", staged, devices=["cpu", NAME])
    dist.init_process_group(
        "staged",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=BOUND),
    )
    try:
        return work(gpu, rank, blob)
    finally:
        dist.barrier()
        dist.destroy_process_group()


def everywhere(children: Children, folder: Path, work: Callable[..., Any], blob: bytes) -> list[Any]:
    libraries = tuple(map(str, fakegpu.build()))
    ranks = [
        children.start(on_rank, str(folder), libraries, rank, work, blob, method="forkserver") for rank in range(RANKS)
    ]
    return [rank.result() for rank in ranks]


def request() -> Request:
    return Request([pattern(seed, MIB) for seed in range(4)], np.arange(20_000))


def message(value: Request, readers: int) -> bytes:
    with shmx.readers(readers):
        return pickle.dumps(shmx.wrap(value))


def is_request(found: Request) -> bool:
    images = all(image.device == FAKE and is_pattern(image.cpu(), seed) for seed, image in enumerate(found.images))
    return images and np.array_equal(found.mask, np.arange(20_000))


def unwrap(gpu: FakeDriver, rank: int, blob: bytes) -> tuple[bool, int, int]:
    request = pickle.loads(blob)
    if rank == 0:
        shmx.attach(request.images[0], pin="require", device=FAKE)
    found = shmx.unwrap(request, device=FAKE, fanout="broadcast")
    return is_request(found), gpu.count("HostRegister"), dist.group.WORLD.broadcast_bytes


def test_the_first_rank_alone_copies_from_shared_memory(children: Children, tmp_path: Path) -> None:
    blob = message(request(), readers=RANKS)
    results = everywhere(children, tmp_path, unwrap, blob)
    assert results == [(True, 1, 4 * MIB), (True, 0, 4 * MIB), (True, 0, 4 * MIB)]
    assert messages() == 0


def unwrap_what_the_first_rank_has(gpu: FakeDriver, rank: int, blob: bytes) -> bool:
    request = pickle.loads(blob)
    if rank > 0:
        for image in request.images:
            image.release()
            assert not image.is_available
    return is_request(shmx.unwrap(request, device=FAKE, fanout="broadcast"))


def test_ranks_without_the_data_receive_it(children: Children, tmp_path: Path) -> None:
    blob = message(request(), readers=RANKS)
    assert everywhere(children, tmp_path, unwrap_what_the_first_rank_has, blob) == [True] * RANKS


def unwrap_what_the_first_rank_lost(gpu: FakeDriver, rank: int, blob: bytes) -> tuple[list[str], int]:
    requests = [pickle.loads(blob), Request([], None)]
    if rank == 0:
        requests[0].images[2].release()
    found, errors = shmx.unwrap(requests, device=FAKE, fanout="broadcast", on_error="return")
    assert found is requests
    assert rank == 0 or is_request(requests[0])
    assert rank > 0 or isinstance(requests[0].images[0], shmx.SharedTensor)
    return [type(error).__name__ for error in errors], dist.group.WORLD.broadcast_bytes


def test_what_the_first_rank_has_not_each_copies_for_itself(children: Children, tmp_path: Path) -> None:
    blob = message(request(), readers=RANKS)
    results = everywhere(children, tmp_path, unwrap_what_the_first_rank_lost, blob)
    assert results == [(["ReleasedError", "NoneType"], 0)] + [(["NoneType", "NoneType"], 0)] * 2


def unwrap_on_a_broken_device(gpu: FakeDriver, rank: int, blob: bytes) -> str:
    request = pickle.loads(blob)
    if rank == 0:
        gpu.fail("MemcpyHtoDAsync", code=700, sticky=True)
    try:
        found = shmx.unwrap(request, device=FAKE, fanout="broadcast")
    except shmx.DeviceError as error:
        return type(error).__name__
    finally:
        gpu.recover()
    return str(is_request(found))


def test_a_first_rank_whose_device_fails_keeps_nobody_waiting(children: Children, tmp_path: Path) -> None:
    blob = message(request(), readers=RANKS)
    assert everywhere(children, tmp_path, unwrap_on_a_broken_device, blob) == ["DeviceError", "True", "True"]


def test_a_broadcast_needs_a_device_and_a_group() -> None:
    with pytest.raises(ValueError, match="give device="):
        shmx.unwrap([], fanout="broadcast")
    with pytest.raises(ValueError, match="leave out lazy="):
        shmx.unwrap([], fanout="broadcast", device="cpu", lazy=True)
    with pytest.raises(ValueError, match="'direct' or 'broadcast'"):
        shmx.unwrap([], fanout="ring")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="init_process_group"):
        shmx.unwrap([], fanout="broadcast", device="cpu")
