"""SGLang 0.5.23 on shmx: its own functions, from the tokenizer's wrap to the ranks' materialized features."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests import sglang_engine
from tests.forkserver import preloaded
from tests.sglang_engine import Layout, serve, tokenize

pytestmark = pytest.mark.skipif(sglang_engine.why_not() is not None, reason=str(sglang_engine.why_not()))

SIZE = 64 << 10


@pytest.fixture(scope="module", autouse=True)
def server():
    with preloaded("tests.sglang_preloaded"):
        yield


def run(children, folder: Path, layout: Layout, requests=60, samples=1, count=2, on_shmx=True, barrier="own", work=40):
    """All ranks' outcomes added up, and the tokenizer's answer."""
    numbers = range(requests)
    expected = [sum(number % layout.dp == group for number in numbers) * samples for group in range(layout.dp)]
    tokenizer = children.start(tokenize, folder, layout, numbers, samples, count, SIZE, on_shmx, method="forkserver")
    ranks = [
        children.start(serve, folder, layout, rank, expected, count, SIZE, on_shmx, barrier, work, method="forkserver")
        for rank in range(layout.world)
    ]
    assert tokenizer.receive() == "sent"
    for rank in ranks:
        assert rank.receive() == "done"
    for child in [tokenizer, *ranks]:
        child.send("end")
    outcome = sum((rank.result() for rank in ranks), Counter())
    return outcome, tokenizer.result()


@pytest.mark.parametrize(
    "layout",
    [Layout(2), Layout(4), Layout(4, dp=2), Layout(2, pp=2)],
    ids=["tp2", "tp4", "dp-attention", "pipeline"],
)
def test_every_rank_owns_every_feature_without_a_barrier(children, tmp_path, layout):
    outcome, (inline, _) = run(children, tmp_path, layout)
    ranks = layout.tp // layout.dp * layout.pp
    assert (outcome, inline) == (Counter(right=60 * ranks), 0)
