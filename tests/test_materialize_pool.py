"""The memory of a materialized tensor is used again for the next one, up to a limit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import shmx
from shmx import _core

MIB = 1 << 20
DEFAULT_LIMIT = 1 << 30


def filled(size: int, fill: int = 1) -> torch.Tensor:
    return torch.full((size,), fill, dtype=torch.uint8)


@pytest.fixture
def limit() -> Iterator[object]:
    """Sets the limit of the pool for one test."""
    yield _core.set_pool_limit
    _core.set_pool_limit(DEFAULT_LIMIT)


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def test_a_dropped_results_memory_is_used_for_the_next():
    handle = shmx.share(filled(8 * MIB, 3))
    first = handle.materialize()
    address = first.data_ptr()
    first.fill_(9)
    assert shmx.stats()["pool_bytes"] == 0
    del first
    assert shmx.stats()["pool_bytes"] == 8 * MIB
    second = handle.materialize()
    assert second.data_ptr() == address
    assert shmx.stats()["pool_bytes"] == 0
    assert torch.equal(second, filled(8 * MIB, 3))


def test_memory_is_not_used_again_while_an_alias_lives():
    handle = shmx.share(filled(8 * MIB, 3))
    first = handle.materialize()
    alias = first[100:200]
    array = first.numpy()[300:400]
    address = first.data_ptr()
    del first
    second = handle.materialize()
    assert second.data_ptr() != address
    second.fill_(9)
    del alias
    third = handle.materialize()
    assert third.data_ptr() not in (address, second.data_ptr())
    assert (array == 3).all()
    del array
    gc.collect()
    assert handle.materialize().data_ptr() == address


def test_results_that_live_together_share_no_memory():
    handle = shmx.share(filled(MIB))
    results = [handle.materialize() for _ in range(5)]
    for fill, result in enumerate(results):
        result.fill_(fill)
    assert [result.unique().tolist() for result in results] == [[fill] for fill in range(5)]


def test_a_tensor_of_another_size_gets_other_memory():
    large, small = shmx.share(filled(8 * MIB)), shmx.share(filled(3 * MIB))
    address = large.materialize().data_ptr()
    kept = shmx.stats()["pool_bytes"]
    other = small.materialize()
    assert other.data_ptr() != address
    assert shmx.stats()["pool_bytes"] == kept


def test_a_tensor_of_another_dtype_and_layout_uses_the_same_memory():
    whole = shmx.empty((MIB, 2), dtype=torch.float32)
    whole.copy_(torch.arange(2.0 * MIB).reshape(MIB, 2))
    strided = shmx.share(whole.t())
    address = shmx.share(filled(8 * MIB)).materialize().data_ptr()
    result = strided.materialize()
    assert result.data_ptr() == address
    assert torch.equal(result, whole.t())


def test_results_are_aligned_for_vector_instructions():
    for size in (1, 100, 5000, 1 << 16, MIB + 1, 3 * MIB):
        assert shmx.share(filled(size)).materialize().data_ptr() % 64 == 0


def test_the_pool_keeps_no_more_than_its_limit(limit):
    limit(20 * MIB)
    handle = shmx.share(filled(8 * MIB))
    results = [handle.materialize() for _ in range(4)]
    addresses = [result.data_ptr() for result in results]
    while results:
        results.pop(0)
        assert shmx.stats()["pool_bytes"] <= 20 * MIB
    # The oldest went back to the system.
    assert shmx.stats()["pool_bytes"] == 16 * MIB
    assert [is_mapped(address) for address in addresses] == [False, False, True, True]


def test_a_result_larger_than_the_limit_goes_back_to_the_system(limit):
    limit(4 * MIB)
    address = shmx.share(filled(8 * MIB)).materialize().data_ptr()
    assert shmx.stats()["pool_bytes"] == 0
    assert not is_mapped(address)


def test_small_results_are_left_to_malloc():
    shmx.share(filled(1000)).materialize()
    assert shmx.stats()["pool_bytes"] == 0


def test_a_pool_that_is_cleared_keeps_nothing():
    shmx.share(filled(8 * MIB)).materialize()
    assert shmx.stats()["pool_bytes"] == 8 * MIB
    _core.clear_pool()
    assert shmx.stats()["pool_bytes"] == 0


def keeps_after_materialize(connection: Connection) -> tuple[int, int, bool]:
    handle = connection.recv()
    before = shmx.stats()["pool_bytes"]
    result = handle.materialize()
    right = torch.equal(result, handle.view())
    del result
    return before, shmx.stats()["pool_bytes"], right


@pytest.mark.parametrize(("text", "kept"), [("0", 0), (str(8 * MIB), 8 * MIB), ("64MiB", 8 * MIB)])
def test_the_environment_sets_the_limit(text, kept, children, monkeypatch):
    monkeypatch.setenv("SHMX_POOL_BYTES", text)
    child = children.start(keeps_after_materialize)
    child.send(shmx.share(filled(8 * MIB)))
    assert child.result() == (0, kept, True)
