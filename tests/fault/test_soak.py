"""Memory stays flat: requests of mixed sizes through four ranks, shared memory and RSS of every process watched."""

from __future__ import annotations

import pickle
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import shmx
from tests.children import Children

RANKS = 4
SAMPLES = 40
# The destination pool keeps pieces of every size class that has come by, 30 MiB in all, and malloc settles late. Over
# the long run this is 400 bytes a request.
SLACK = 40 << 20


def _rss() -> int:
    """Private memory in bytes; the shared pages that a rank has touched are counted on the producer's side."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10


def _rank(connection: Any, every: int) -> list[int]:
    torch.set_num_threads(1)
    rss: list[int] = []
    received = 0
    while (blob := connection.recv_bytes()) != b"end":
        seed, handle = pickle.loads(blob)
        tensor = handle.materialize() if seed % 3 == 0 else handle.view()
        assert tensor[0] == seed % 251 and tensor[-1] == seed % 251, f"message {seed}"
        del tensor, handle
        received += 1
        if received % every == 0:
            rss.append(_rss())
    return rss


def _flat(series: list[int], what: str) -> str:
    quarter = len(series) // 4
    early, late = statistics.median(series[quarter : 2 * quarter]), statistics.median(series[-quarter:])
    assert late <= early + SLACK, f"{what} grew from {early / 2**20:.1f} to {late / 2**20:.1f} MiB"
    return f"{what}: {early / 2**20:.1f} -> {late / 2**20:.1f} MiB"


def _soak(children: Children, requests: int) -> None:
    every = requests // SAMPLES
    sizes = random.Random(3)
    ranks = [children.start(_rank, every) for _ in range(RANKS)]
    reserved: list[int] = []
    rss: list[int] = []
    for request in range(requests):
        # Log-uniform from 16 bytes to 1 MiB: small ones are frequent, every size class occurs.
        tensor = torch.full((int(16 * 2 ** sizes.uniform(0, 16)),), request % 251, dtype=torch.uint8)
        with shmx.readers(RANKS):
            blob = pickle.dumps((request, shmx.share(tensor)))
        for rank in ranks:
            rank.connection.send_bytes(blob)
        if (request + 1) % every == 0:
            reserved.append(shmx.stats()["arena"]["reserved_bytes"])
            rss.append(_rss())
    for rank in ranks:
        rank.connection.send_bytes(b"end")
    lines = [_flat(reserved, "shared memory"), _flat(rss, "RSS of the producer")]
    lines += [_flat(rank.result(), f"RSS of rank {i}") for i, rank in enumerate(ranks)]
    print(f"{requests} requests\n" + "\n".join(lines))


def test_memory_stays_flat_over_two_thousand_requests(children):
    _soak(children, 2_000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_stays_flat_over_a_hundred_thousand_requests(children):
    _soak(children, 100_000)
