"""What a device has to do for a caller, on the fake one and, where there is one, on a GPU.

Each device has a process of its own: torch knows one accelerator per process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import shmx
from shmx import _core, device
from tests import fakegpu
from tests.children import Children
from tests.patterns import is_pattern, pattern, press

MIB = 1 << 20


def locked_arena(where: torch.device) -> shmx.Arena:
    arena = shmx.Arena(capacity=64 * MIB, segment_bytes=64 * MIB, reserve=64 * MIB)
    filler = [arena.share(pattern(seed, 16 * MIB)) for seed in range(4)]
    shmx.attach(filler[0], pin="require", device=where)
    return arena


def settle(where: torch.device) -> None:
    torch.accelerator.synchronize(where)
    while _core.pin_report()["copies_in_flight"]:
        _core.poll_copies()


def tensors_arrive_and_come_back(where: torch.device) -> None:
    with locked_arena(where) as arena:
        for seed, size in enumerate((8, 4096, 65536 + 8, 16 * MIB)):
            handle = arena.share(pattern(seed, size))
            arrived = handle.materialize(where)
            handle.release()
            assert is_pattern(arrived.cpu(), seed)
            with arena.share(arrived) as back:
                assert is_pattern(back.view(), seed)
        settle(where)


def blocks_are_not_used_again_under_their_copies(where: torch.device) -> None:
    with locked_arena(where) as arena:
        for seed in range(20):
            handle = arena.share(pattern(seed, 16 * MIB))
            arrived = handle.materialize(where)
            handle.release()
            press(arena)
            assert is_pattern(arrived.cpu(), seed)
        settle(where)


def results_may_be_used_on_the_current_stream(where: torch.device) -> None:
    with locked_arena(where) as arena:
        stream = torch.Stream(where)
        for seed in range(20):
            handle = arena.share(pattern(seed, 4 * MIB))
            arrived = handle.materialize(where, stream=stream)
            handle.release()
            assert is_pattern(arrived.clone().cpu(), seed)
        settle(where)


def batches_arrive(where: torch.device) -> None:
    with locked_arena(where) as arena:
        sent = [torch.arange(count * 100.0) for count in range(32)]
        handles = arena.share_many(sent)
        arrived = device.materialize_many(handles, where)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(arrived, sent, strict=True))
        del handles
        settle(where)


def nothing_is_registered_after_the_warm_up(where: torch.device) -> None:
    with locked_arena(where) as arena:
        before = _core.pin_report()["registrations"]
        for seed in range(20):
            with arena.share(pattern(seed, MIB)) as handle:
                handle.materialize(where)
        settle(where)
        _core.settle_pinning()
        assert _core.pin_report()["registrations"] == before


def all_is_unregistered_at_the_end(where: torch.device) -> None:
    with locked_arena(where):
        assert _core.pin_report()["bytes"] == 64 * MIB
    assert _core.pin_report()["bytes"] == _core.pin_report()["quarantined_bytes"] == 0


RULES: tuple[Callable[[torch.device], None], ...] = (
    tensors_arrive_and_come_back,
    blocks_are_not_used_again_under_their_copies,
    results_may_be_used_on_the_current_stream,
    batches_arrive,
    nothing_is_registered_after_the_warm_up,
    all_is_unregistered_at_the_end,
)


def keep_rules(connection: Connection, *libraries: str) -> list[str]:
    if libraries:
        driver, library = map(Path, libraries)
        fakegpu.use(driver, library)
    where = torch.device("privateuseone" if libraries else "cuda", 0)
    kept = []
    for rule in RULES:
        rule(where)
        kept.append(rule.__name__)
    return kept


def test_the_fake_device_keeps_all_rules(fake_libraries: tuple[Path, Path], children: Children) -> None:
    assert children.start(keep_rules, *map(str, fake_libraries)).result() == [rule.__name__ for rule in RULES]


@pytest.mark.cuda
def test_a_gpu_keeps_all_rules(children: Children) -> None:
    if not torch.cuda.is_available() and os.environ.get("SHMX_REQUIRE_CUDA") != "1":
        pytest.skip("no GPU, or a torch without CUDA")
    assert children.start(keep_rules).result() == [rule.__name__ for rule in RULES]
