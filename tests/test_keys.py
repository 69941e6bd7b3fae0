"""A key names content: while its block lives, the same block is shared again and nothing is copied."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch

import shmx
from shmx import _core
from tests.blocks import block_of, generation_of, messages

SIZE = 1 << 16


def image(fill: int, size: int = SIZE) -> torch.Tensor:
    return torch.full((size,), fill, dtype=torch.uint8)


def published(arena: shmx.Arena) -> int:
    return arena.stats()["published"]


def test_the_same_key_is_the_same_block_and_nothing_is_copied():
    arena = shmx.Arena(capacity=1 << 20)
    first = arena.share(image(1), key="a")
    # The key alone decides: what is shared under it a second time is not looked at.
    second = arena.share(image(2), key="a")
    assert block_of(first) == block_of(second)
    assert generation_of(first) == generation_of(second)
    assert published(arena) == 1
    assert torch.equal(second.view(), image(1))


def test_each_key_and_no_key_have_blocks_of_their_own():
    handles = [shmx.share(image(1), key="a"), shmx.share(image(1), key="b"), shmx.share(image(1))]
    assert len({block_of(handle) for handle in handles}) == 3


def test_a_key_is_known_in_its_own_arena_only():
    first, second = shmx.Arena(capacity=1 << 20), shmx.Arena(capacity=1 << 20)
    handles = [first.share(image(1), key="a"), second.share(image(1), key="a")]
    assert [block_of(handle)[0] for handle in handles] == [first.name[1:], second.name[1:]]


def test_a_key_outlives_its_last_handle_while_there_is_room():
    arena = shmx.Arena(capacity=1 << 24)
    first = arena.share(image(1), key="a")
    block = block_of(first)
    first.release()
    others = [arena.share(image(fill)) for fill in range(2, 40)]
    again = arena.share(image(9), key="a")
    assert block_of(again) == block
    assert torch.equal(again.view(), image(1))
    assert len(others) == 38


def test_after_reuse_under_pressure_a_key_is_a_fresh_copy():
    arena = shmx.Arena(capacity=4 * SIZE)
    arena.share(image(1), key="a").release()
    others = [arena.share(image(fill)) for fill in range(2, 6)]
    with pytest.raises(shmx.ArenaFullError):
        arena.share(image(1), key="a")
    others.pop().release()
    again = arena.share(image(7), key="a")
    assert torch.equal(again.view(), image(7))
    assert published(arena) == 6
    assert block_of(arena.share(image(8), key="a")) == block_of(again)


def test_pressure_takes_the_key_that_was_not_shared_for_longest():
    arena = shmx.Arena(capacity=4 * SIZE)
    for key in "abcd":
        arena.share(image(1), key=key).release()
    arena.share(image(1), key="a").release()
    assert published(arena) == 4
    filler = arena.share(image(2))
    for key in "acd":
        arena.share(image(1), key=key).release()
    assert published(arena) == 5
    arena.share(image(1), key="b").release()
    assert published(arena) == 6
    filler.release()


@pytest.mark.parametrize("other", [image(1, SIZE // 2), image(1).reshape(2, -1), image(1).view(torch.int8)])
def test_a_key_of_another_shape_or_dtype_is_a_value_error_that_names_it(other):
    first = shmx.share(image(1), key="request 7")
    with pytest.raises(ValueError, match=r"key 'request 7' is taken by a tensor of another shape or dtype"):
        shmx.share(other, key="request 7")
    assert torch.equal(first.view(), image(1))
    assert block_of(shmx.share(image(1), key="request 7")) == block_of(first)


def test_a_key_is_free_for_another_shape_once_its_block_is_reused():
    arena = shmx.Arena(capacity=2 * SIZE)
    arena.share(image(1), key="a").release()
    with arena.share(image(2, 2 * SIZE)):
        pass
    assert arena.share(image(3, 10), key="a").shape == (10,)


def test_an_empty_key_is_a_value_error():
    with pytest.raises(ValueError, match="key is a string that is not empty"):
        shmx.share(image(1), key="")


@pytest.mark.parametrize("key", [5, ("a",), object()])
def test_a_key_that_is_no_string_is_a_type_error(key):
    with pytest.raises(TypeError):
        shmx.share(image(1), key=key)


def test_keys_of_any_characters_differ():
    keys = ["a", "a\0b", "a\0c", "ä", "日本", "x" * 100_000]
    handles = {key: shmx.share(image(number, 8), key=key) for number, key in enumerate(keys)}
    for number, key in enumerate(keys):
        again = shmx.share(image(99, 8), key=key)
        assert block_of(again) == block_of(handles[key])
        assert torch.equal(again.view(), image(number, 8))


def test_more_messages_than_a_block_can_count_under_one_key_all_load():
    arena = shmx.Arena(capacity=64 * SIZE)
    blobs, blocks = [], set()
    for _ in range(3 * _core.MESSAGE_CELLS):
        with arena.share(image(1), key="a") as handle, shmx.readers(1):
            blobs.append(pickle.dumps(handle))
            blocks.add(block_of(handle))
    # A block without a free cell is not used for another message: a fresh copy takes over the key.
    assert len(blocks) == 3
    assert messages(arena) == 3 * _core.MESSAGE_CELLS
    # Nothing may touch them, whatever comes.
    fillers = [arena.share(image(2)) for _ in range(61)]
    with pytest.raises(shmx.ArenaFullError):
        arena.share(image(2))
    for blob in blobs:
        assert torch.equal(pickle.loads(blob).view(), image(1))
    assert messages(arena) == 0
    assert len(fillers) == 61


def test_the_key_of_a_revoked_block_is_a_fresh_copy():
    arena = shmx.Arena(capacity=1 << 20)
    first = arena.share(image(1), key="a")
    holder = copy.copy(first)
    first.revoke()
    again = arena.share(image(2), key="a")
    assert block_of(again) != block_of(holder)
    assert torch.equal(again.view(), image(2))
    assert torch.equal(holder.view(), image(1))


def test_a_key_of_an_empty_tensors_slice_keeps_offset_and_strides():
    whole = shmx.empty((4, 6), dtype=torch.int64)
    whole.copy_(torch.arange(24).reshape(4, 6))
    part = whole[1:, ::2]
    first = shmx.share(part, key="a")
    again = shmx.share(torch.zeros(3, 3, dtype=torch.int64), key="a")
    assert block_of(again) == block_of(first)
    assert again.view().stride() == part.stride()
    assert torch.equal(again.view(), part)


def test_a_block_has_the_key_it_was_shared_under_last():
    handle = shmx.share(image(1), key="a")
    renamed = shmx.share(handle.view(), key="b")
    assert block_of(renamed) == block_of(handle)
    assert block_of(shmx.share(image(2), key="b")) == block_of(handle)
    fresh = shmx.share(image(2), key="a")
    assert block_of(fresh) != block_of(handle)
    assert torch.equal(fresh.view(), image(2))


def test_trim_ends_the_keys_of_idle_blocks():
    arena = shmx.Arena(capacity=1 << 20)
    arena.share(image(1), key="a").release()
    gc.collect()
    assert arena.trim() > 0
    assert torch.equal(arena.share(image(2), key="a").view(), image(2))


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(3, 3, device="meta")], ids=["sparse", "meta"])
def test_a_known_key_does_not_let_a_tensor_pass_that_cannot_be_shared(tensor):
    handle = shmx.share(torch.eye(3), key="a")
    with pytest.raises(TypeError, match="dense tensors"):
        shmx.share(tensor, key="a")
    assert handle.is_available
