"""Tensors that travel together: one block and one message for all of them (rules 1 to 5, 8)."""

from __future__ import annotations

import copy
import pickle
import pickletools

import cloudpickle
import pytest
import torch

import shmx
from tests.blocks import block_of, messages
from tests.patterns import is_pattern, pattern, small_arena


def dumps(handles, readers=1):
    with shmx.readers(readers):
        return pickle.dumps(handles)


def load_and_sum(connection, blob):
    handles = pickle.loads(blob)
    return [float(handle.view().double().sum()) for handle in handles]


def test_each_comes_back_as_it_was_and_all_share_one_block():
    tensors = [torch.arange(7), torch.rand(300, 40).bfloat16(), torch.tensor(3.5), torch.ones(2, 2, dtype=torch.bool)]
    handles = shmx.share_many(tensors)
    assert len({block_of(handle) for handle in handles}) == 1
    for handle, tensor in zip(handles, tensors, strict=True):
        assert (handle.shape, handle.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(handle.view(), tensor)
        assert torch.equal(handle.materialize(), tensor)
        assert handle.view().data_ptr() % 64 == 0


def test_layouts_and_empty_tensors_are_stored_like_those_of_share():
    base = torch.arange(24.0).reshape(4, 6)
    tensors = [base.t(), base[1:, ::2], torch.zeros(0, 3), base[:1].expand(5, 6), torch.complex(base, base).conj()]
    for handle, tensor in zip(shmx.share_many(tensors), tensors, strict=True):
        assert torch.equal(handle.view(), tensor)
        assert handle.view().is_contiguous()


def test_a_pickle_of_them_is_one_message_and_one_load():
    handles = shmx.share_many([pattern(seed) for seed in range(20)])
    blob = dumps(handles)
    assert messages() == 1
    loaded = pickle.loads(blob)
    assert messages() == 0
    assert all(is_pattern(handle.view(), seed) for seed, handle in enumerate(loaded))
    assert [repr(handle) for handle in loaded] == [repr(handle) for handle in handles]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_one_of_them_in_a_pickle_is_small_and_needs_no_other(protocol):
    handles = shmx.share_many([torch.zeros([2] * 8), torch.ones(3)])
    with shmx.readers(1):
        blob = pickle.dumps(handles[0], protocol)
    assert len(blob) <= 256
    handles[0].release()
    handles[1].release()
    assert torch.equal(pickle.loads(blob).view(), torch.zeros([2] * 8))


def test_a_further_one_adds_little_to_a_pickle():
    tensors = [torch.zeros(100, 1176) for _ in range(100)]
    handles = shmx.share_many(tensors)
    assert (len(dumps(handles, 0)) - len(dumps(handles[:1], 0))) / 99 <= 48


def test_rule_2_announced_loads_survive_the_release_of_all(children):
    tensors = [torch.full((size,), float(size)) for size in (3, 50_000, 7)]
    handles = shmx.share_many(tensors)
    blob = dumps(handles, readers=3)
    for handle in handles:
        handle.release()
    assert shmx.stats()["arena"]["held_blocks"] == 0
    for _ in range(3):
        assert children.start(load_and_sum, blob).result() == [9.0, 2_500_000_000.0, 49.0]
    assert messages() == 0


def test_rule_4_loaded_ones_are_forwarded_together():
    blob = dumps(shmx.share_many([pattern(1), pattern(2)]))
    for _ in range(4):
        loaded = pickle.loads(blob)
        blob = dumps(loaded)
        del loaded
        assert messages() == 1
    first, second = pickle.loads(blob)
    assert is_pattern(first.view(), 1)
    assert is_pattern(second.view(), 2)


def test_rule_5_loading_them_never_raises_because_data_is_gone():
    with small_arena() as arena:
        handles = arena.share_many([pattern(1), pattern(2)])
        blob = dumps(handles)
        handles[0].revoke()
        del handles
        for handle in pickle.loads(blob):
            assert not handle.is_available
            assert isinstance(handle.error, shmx.StaleHandleError)
            with pytest.raises(shmx.StaleHandleError):
                pickle.loads(dumps(handle)).view()


def test_rule_8_the_block_is_free_when_the_last_of_them_is_released():
    handles = shmx.share_many([pattern(1), pattern(2), pattern(3)])
    held = shmx.stats()["arena"]["held_blocks"]
    view = handles[2].view()
    for handle in handles:
        handle.release()
        handle.release()
    assert shmx.stats()["arena"]["held_blocks"] == held
    assert is_pattern(view, 3)
    del view
    assert shmx.stats()["arena"]["held_blocks"] == held - 1
    with pytest.raises(shmx.ReleasedError):
        handles[0].view()


def test_copies_and_cloudpickle_are_of_the_same_block():
    handles = shmx.share_many([pattern(1), pattern(2)])
    assert block_of(copy.deepcopy(handles)[1]) == block_of(copy.copy(handles[0])) == block_of(handles[0])
    assert messages() == 0
    assert is_pattern(cloudpickle.loads(cloudpickle.dumps(handles))[1].view(), 2)


def test_one_bound_to_readers_or_written_as_bytes_is_a_message_of_its_own():
    handles = shmx.share_many([pattern(1), pattern(2)])
    blob = pickle.dumps([handles[0].with_readers(2), handles[1]])
    assert messages() == 2
    raw = handles[1].to_bytes()
    assert messages() == 3
    for _ in range(2):
        assert is_pattern(pickle.loads(blob)[0].view(), 1)
    assert is_pattern(shmx.SharedTensor.from_bytes(raw).view(), 2)
    assert messages() == 0


def test_a_discarded_pickle_of_them_leaves_no_message():
    blob = dumps(shmx.share_many([pattern(1), pattern(2)]), readers=4)
    assert shmx.discard(blob) == 1
    assert messages() == 0


def test_tensors_that_live_in_the_arena_are_not_copied():
    placed = shmx.empty((50, 4), dtype=torch.int32)
    placed.fill_(7)
    handles = shmx.share_many([pattern(1), placed, pattern(2), placed[3:]])
    assert handles[1].view().data_ptr() == placed.data_ptr()
    assert handles[3].view().data_ptr() == placed[3:].data_ptr()
    assert block_of(handles[0]) == block_of(handles[2]) != block_of(handles[1])


@pytest.mark.parametrize("tensors", [[], [torch.ones(3)]])
def test_none_and_one_are_nothing_special(tensors):
    handles = shmx.share_many(iter(tensors))
    assert [handle.shape for handle in handles] == [tuple(tensor.shape) for tensor in tensors]


def test_one_that_cannot_be_shared_leaves_nothing_published():
    published = shmx.default_arena().stats()["published"]
    with pytest.raises(TypeError, match="dense"):
        shmx.share_many([torch.ones(3), torch.ones(3).to_sparse()])
    with pytest.raises(TypeError, match=r"share takes a torch\.Tensor"):
        shmx.share_many([torch.ones(3), None])
    assert shmx.default_arena().stats()["published"] == published


def test_too_many_bytes_together_are_a_full_arena():
    with small_arena() as arena, pytest.raises(shmx.ArenaFullError):
        arena.share_many([torch.zeros(arena.capacity // 2 + 1, dtype=torch.uint8)] * 2)
    with small_arena() as arena, pytest.raises(shmx.ArenaFullError):
        arena.share_many([torch.zeros(1).expand(2**46)] * 40)


def test_a_part_that_exceeds_its_block_is_refused():
    handles = shmx.share_many([torch.zeros(1000), torch.zeros(10)])
    larger = shmx.share_many([torch.zeros(10), torch.zeros(100_000)])
    arguments = [argument for _, argument, _ in pickletools.genops(dumps(larger, 0))]
    texts = [text for text in arguments if isinstance(text, str) and text.startswith("U1AB")]
    whole = handles[0].__reduce_ex__(4)[1][1]
    assert whole.nbytes < larger[1].nbytes
    with pytest.raises(shmx.InvalidHandleError, match="larger than what block"):
        shmx.SharedTensor(texts[1], whole)
    for damaged in ("", texts[1][:-1], texts[1][:8] + "A" + texts[1][9:], "U1gB" + texts[1][4:], "é"):
        with pytest.raises(shmx.InvalidHandleError):
            shmx.SharedTensor(damaged, whole)
    with pytest.raises(shmx.InvalidHandleError):
        shmx.SharedTensor(texts[1])
    for not_a_whole in ("whole", shmx.SharedTensor.__new__(shmx.SharedTensor)):
        with pytest.raises(TypeError):
            shmx.SharedTensor(texts[1], not_a_whole)


def test_a_forked_child_owns_the_ones_it_inherits(children):
    handles = shmx.share_many([pattern(1), pattern(2)])
    child = children.start(read_when_told, handles, method="fork")
    assert child.receive() == "ready"
    for handle in handles:
        handle.release()
    child.send("read")
    assert child.result()


def read_when_told(connection, handles):
    connection.send("ready")
    connection.recv()
    return is_pattern(handles[0].view(), 1) and is_pattern(handles[1].view(), 2)
