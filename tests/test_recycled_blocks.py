"""A block that is used again shows no byte of an earlier tensor: handles end where theirs does, and scrub clears."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

import shmx
from tests.handle_bytes import parse

SECRET = 0xAB
BIG, SMALL = 65536, 65001  # blocks come in steps of a sixteenth: one is used for both


def recycled(arena: shmx.Arena, *tensors: torch.Tensor) -> list[shmx.SharedTensor]:
    """Publish a secret, let go of it, and publish the tensors where it was."""
    arena.share(torch.full((BIG,), SECRET, dtype=torch.uint8)).release()
    return arena.share_many(tensors)


def secrets_in(arena: shmx.Arena) -> int:
    """Bytes of the secret that whoever may open the segment can read."""
    (path,) = Path("/dev/shm").glob(arena.name.removeprefix("/") + ".*")
    return path.read_bytes().count(SECRET)


@pytest.fixture(params=[False, True], ids=["plain", "scrub"])
def arena(request):
    with shmx.Arena(capacity=1 << 20, scrub=request.param) as made:
        yield made


def test_a_view_of_a_smaller_tensor_ends_with_it(arena):
    (handle,) = recycled(arena, torch.zeros(SMALL, dtype=torch.uint8))
    for view in (handle.view(), pickle.loads(pickle.dumps(handle)).view()):
        assert view.untyped_storage().nbytes() == SMALL
        with pytest.raises(RuntimeError, match="out of bounds"):
            view.as_strided((SMALL + 1,), (1,))
        with pytest.raises(RuntimeError, match="resiz"):
            view.untyped_storage().resize_(BIG)
    assert handle.materialize().untyped_storage().nbytes() == SMALL


def test_no_bytes_of_a_handle_lead_beyond_the_smaller_tensor(arena):
    (handle,) = recycled(arena, torch.zeros(SMALL, dtype=torch.uint8))
    with shmx.readers(0):
        good = parse(handle.to_bytes())

    def load(**change) -> shmx.SharedTensor:
        return shmx.SharedTensor.from_bytes(dataclasses.replace(good, **change).to_bytes())

    assert load(offset=SMALL - 1, shape=(1,)).view().item() == 0
    for beyond in ({"shape": (SMALL + 1,)}, {"offset": SMALL, "shape": (1,)}, {"shape": (2,), "strides": (SMALL,)}):
        with pytest.raises(shmx.InvalidHandleError, match="larger than what block"):
            load(**beyond)


def test_the_handle_of_a_whole_bundle_shows_nothing_between_its_parts(arena):
    parts = recycled(arena, *(torch.zeros(size, dtype=torch.uint8) for size in (1, 65, 100, 64000, 3)))
    with shmx.readers(0):
        first = parse(parts[0].to_bytes())
        last = parse(parts[-1].to_bytes())
    whole = shmx.SharedTensor.from_bytes(dataclasses.replace(first, shape=(last.offset + 3,)).to_bytes())
    assert not bool((whole.view() == SECRET).any())
    with pytest.raises(shmx.InvalidHandleError):
        shmx.SharedTensor.from_bytes(dataclasses.replace(first, shape=(last.offset + 4,)).to_bytes())


@pytest.mark.needs_names
def test_an_earlier_tensor_stays_in_the_rest_of_a_block_that_is_not_scrubbed():
    """What the next test looks for can be seen."""
    with shmx.Arena(capacity=1 << 20) as arena:
        kept = recycled(arena, torch.zeros(SMALL, dtype=torch.uint8))
        assert secrets_in(arena) == BIG - SMALL
        del kept


@pytest.mark.parametrize(
    "shapes", [(SMALL,), (SMALL - 200, 3, 70), (BIG,)], ids=["smaller", "a bundle", "the same size"]
)
@pytest.mark.needs_names
def test_scrub_leaves_no_byte_of_an_earlier_tensor_in_the_block(shapes):
    """Read from the segment itself, past all handles."""
    with shmx.Arena(capacity=1 << 20, scrub=True) as arena:
        kept = recycled(arena, *(torch.zeros(shape, dtype=torch.uint8) for shape in shapes))
        assert secrets_in(arena) == 0
        del kept


@pytest.mark.needs_names
def test_scrub_clears_what_shmx_empty_hands_out():
    with shmx.Arena(capacity=1 << 20, scrub=True) as arena:
        arena.share(torch.full((BIG,), SECRET, dtype=torch.uint8)).release()
        assert secrets_in(arena) == BIG
        made = arena.empty((SMALL,), dtype=torch.uint8)
        assert secrets_in(arena) == 0
        assert not bool(made.any())
        del made


@pytest.mark.needs_names
def test_scrub_clears_blocks_that_are_cut_from_an_earlier_one_as_they_are_handed_out():
    """Another shape: what is still free keeps its bytes until it is a block."""
    with shmx.Arena(capacity=BIG, segment_bytes=BIG, scrub=True) as arena:
        arena.share(torch.full((BIG,), SECRET, dtype=torch.uint8)).release()
        kept = []
        for number in range(1, BIG // 4096 + 1):
            kept.append(arena.share(torch.zeros(4000, dtype=torch.uint8)))
            assert secrets_in(arena) == BIG - number * 4096
        assert secrets_in(arena) == 0
        del kept


def test_a_holder_s_bytes_are_not_scrubbed():
    """Rule 1."""
    with shmx.Arena(capacity=1 << 20, scrub=True) as arena:
        handle = arena.share(torch.full((BIG,), SECRET, dtype=torch.uint8))
        view = handle.view()
        handle.release()
        others = [arena.share(torch.zeros(BIG, dtype=torch.uint8)) for _ in range(8)]
        assert bool((view == SECRET).all())
        del view, others
