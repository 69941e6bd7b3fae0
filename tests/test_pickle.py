"""A handle pickles small, anywhere and any number of times (rules 4 and 5)."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import pickle
import threading

import cloudpickle
import pytest
import torch

import shmx
from shmx import _core
from tests.blocks import block_of, generation_of, messages

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


def load_times(blob: bytes, count: int) -> None:
    for _ in range(count):
        pickle.loads(blob)


# ---- size


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickled_handle_of_eight_dimensions_fits_in_256_bytes(protocol):
    handle = shmx.share(torch.zeros((1, 2, 3, 4, 5, 6, 7, 8)))
    with shmx.readers(1):
        blob = pickle.dumps(handle, protocol)
    assert len(blob) <= 256
    assert pickle.loads(blob).shape == (1, 2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickled_slice_of_eight_large_strides_fits_in_256_bytes(protocol):
    arena = shmx.Arena(capacity=1 << 27)
    whole = arena.empty((1 << 26,), dtype=torch.uint8)
    strides = tuple((1 << shift) - 1 for shift in range(25, 17, -1))
    part = whole.as_strided((2,) * 8, strides, 4095)
    part.copy_(torch.arange(256, dtype=torch.uint8).reshape((2,) * 8))
    with shmx.readers(4095):
        blob = pickle.dumps(arena.share(part), protocol)
    assert len(blob) <= 256
    loaded = pickle.loads(blob)
    assert loaded.view().stride() == strides
    assert torch.equal(loaded.materialize().reshape(-1), torch.arange(256, dtype=torch.uint8))
    assert shmx.discard(blob) == 1


def test_nine_to_64_dimensions_pickle_too():
    for dimensions in (9, 32, 64):
        handle = shmx.share(torch.zeros([1] * (dimensions - 1) + [3]))
        assert pickle.loads(pickle.dumps(handle)).shape == tuple([1] * (dimensions - 1) + [3])


# ---- ways to pickle


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_gives_the_same_block(protocol):
    handle = shmx.share(torch.arange(5))
    loaded = pickle.loads(pickle.dumps(handle, protocol))
    assert block_of(loaded) == block_of(handle)
    assert torch.equal(loaded.view(), torch.arange(5))
    assert messages() == 0


def test_what_reduce_gives_makes_the_handle_again():
    handle = shmx.share(torch.arange(5))
    for function, arguments in (handle.__reduce__(), handle.__reduce_ex__(0)):
        assert block_of(function(*arguments)) == block_of(handle)
    assert messages() == 0


def test_cloudpickle_gives_the_same_block():
    handle = shmx.share(torch.arange(5))
    with shmx.readers(2):
        blob = cloudpickle.dumps({"handle": handle, "function": lambda: handle.nbytes})
    assert messages() == 1
    loaded = cloudpickle.loads(blob)
    assert block_of(loaded["handle"]) == block_of(handle)
    assert loaded["function"]() == 40
    cloudpickle.loads(blob)
    assert messages() == 0


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_a_copy_is_of_the_same_block_and_leaves_no_message(copier):
    handle = shmx.share(torch.arange(5))
    with shmx.readers(3):
        twin = copier(handle)
        bound = copier(handle.with_readers(3))
    assert twin is not handle
    assert block_of(twin) == block_of(handle)
    assert messages() == 0
    assert shmx.stats()["arena"]["published"] == 1
    handle.release()
    assert torch.equal(twin.view(), torch.arange(5))
    # What was bound to a handle is bound to its copy.
    blob = pickle.dumps(bound)
    load_times(blob, 2)
    assert messages() == 1
    load_times(blob, 1)
    assert messages() == 0


def test_a_deep_copy_of_an_object_keeps_one_handle_one():
    handle = shmx.share(torch.arange(5))
    first, second = copy.deepcopy([handle, handle])
    assert first is second
    assert messages() == 0


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_released_handle_carries_the_reason(copier):
    handle = shmx.share(torch.arange(5))
    handle.release()
    with pytest.raises(shmx.ReleasedError):
        copier(handle).view()


def test_the_same_handle_twice_in_one_pickle_is_one_message_and_one_object():
    handle = shmx.share(torch.arange(5))
    blob = pickle.dumps({"a": handle, "b": [handle, handle]})
    assert messages() == 1
    loaded = pickle.loads(blob)
    assert loaded["a"] is loaded["b"][0] is loaded["b"][1]
    assert messages() == 0


def test_two_handles_of_one_block_in_one_pickle_are_two_messages():
    handle = shmx.share(torch.arange(5))
    blob = pickle.dumps([handle, copy.copy(handle)])
    assert messages() == 2
    first, second = pickle.loads(blob)
    assert block_of(first) == block_of(second)
    assert messages() == 0


def test_pickling_makes_no_segment_and_copies_nothing():
    """Rule 4."""
    handle = shmx.share(torch.zeros(1 << 16))
    before = shmx.stats()["arena"]
    blobs = [pickle.dumps(handle) for _ in range(3)]
    assert max(map(len, blobs)) < 256
    loaded = [pickle.loads(blob) for blob in blobs]
    after = shmx.stats()["arena"]
    for same in ("segments", "reserved_bytes", "published", "blocks"):
        assert after[same] == before[same]
    assert len({one.view().data_ptr() for one in (handle, *loaded)}) == 1


def test_any_number_of_hops_ends_at_the_same_data():
    handle = shmx.share(torch.arange(1000))
    block = block_of(handle)
    travelling = handle
    for hop in range(60):
        blob = pickle.dumps(travelling, 2 + hop % 4) if hop % 3 else travelling.to_bytes()
        travelling.release()
        travelling = pickle.loads(blob) if hop % 3 else shmx.SharedTensor.from_bytes(blob)
        assert block_of(travelling) == block
    assert torch.equal(travelling.view(), torch.arange(1000))
    assert messages() == 0
    assert shmx.stats()["arena"]["published"] == 1
    assert generation_of(travelling) == generation_of(handle)


# ---- how often a pickle will be loaded


def test_a_pickle_announces_one_load_by_default():
    blob = pickle.dumps(shmx.share(torch.arange(5)))
    assert messages() == 1
    load_times(blob, 1)
    assert messages() == 0


@pytest.mark.parametrize("count", [1, 2, 7, 4095])
def test_readers_announces_as_many_loads(count):
    with shmx.readers(count):
        blob = pickle.dumps(shmx.share(torch.arange(5)))
    load_times(blob, count - 1)
    assert messages() == 1
    load_times(blob, 1)
    assert messages() == 0


def test_loads_beyond_those_announced_take_nothing_from_another_message():
    """Rule 2."""
    handle = shmx.share(torch.arange(5))
    first, second = pickle.dumps(handle), pickle.dumps(handle)
    load_times(first, 5)
    assert messages() == 1
    load_times(second, 1)
    assert messages() == 0
    # Nor from one that is counted where the first was.
    third = pickle.dumps(handle)
    load_times(first, 5)
    load_times(second, 5)
    assert messages() == 1
    load_times(third, 1)
    assert messages() == 0
    assert torch.equal(pickle.loads(first).view(), torch.arange(5))


def test_readers_0_announces_nothing():
    handle = shmx.share(torch.arange(5))
    with shmx.readers(0):
        blobs = [pickle.dumps(handle), pickle.dumps(handle)]
    assert messages() == 0
    assert blobs[0] == blobs[1]
    assert torch.equal(pickle.loads(blobs[0]).view(), torch.arange(5))


def test_more_messages_than_a_block_can_count_are_unannounced_and_load_while_it_lives():
    """Rule 3."""
    handle = shmx.share(torch.arange(5))
    blobs = [pickle.dumps(handle) for _ in range(_core.MESSAGE_CELLS + 5)]
    assert messages() == _core.MESSAGE_CELLS
    for blob in reversed(blobs):
        assert torch.equal(pickle.loads(blob).view(), torch.arange(5))
    assert messages() == 0
    # A cell that is free again serves the next message.
    blob = pickle.dumps(handle)
    assert messages() == 1
    load_times(blob, 1)


def test_with_readers_wins_over_the_context():
    handle = shmx.share(torch.arange(5))
    with shmx.readers(9):
        blob = pickle.dumps(handle.with_readers(2))
    load_times(blob, 2)
    assert messages() == 0
    with shmx.readers(9):
        pickle.dumps(handle.with_readers(0))
    assert messages() == 0


def test_with_readers_gives_another_handle_of_the_same_block():
    handle = shmx.share(torch.arange(5))
    bound = handle.with_readers(2)
    assert bound is not handle
    assert block_of(bound) == block_of(handle)
    handle.release()
    assert torch.equal(bound.view(), torch.arange(5))
    blob = pickle.dumps(bound.with_readers(1))
    load_times(blob, 1)
    assert messages() == 0


def test_inner_readers_replace_the_outer_until_they_end():
    handle = shmx.share(torch.arange(5))
    with shmx.readers(4):
        with shmx.readers(1):
            inner = pickle.dumps(handle)
        load_times(inner, 1)
        assert messages() == 0
        outer = pickle.dumps(handle)
    load_times(outer, 3)
    assert messages() == 1
    load_times(outer, 1)
    assert messages() == 0
    after = pickle.dumps(handle)
    load_times(after, 1)
    assert messages() == 0


def test_readers_count_for_to_bytes_too():
    with shmx.readers(2):
        state = shmx.share(torch.arange(5)).to_bytes()
    shmx.SharedTensor.from_bytes(state)
    assert messages() == 1
    shmx.SharedTensor.from_bytes(state)
    assert messages() == 0


def test_an_exception_inside_readers_takes_its_messages_back():
    handle = shmx.share(torch.arange(5))
    kept = pickle.dumps(handle)
    with contextlib.suppress(KeyError), shmx.readers(3):
        blobs = [pickle.dumps(handle), handle.to_bytes(), pickle.dumps(handle.with_readers(5))]
        assert messages() == 4
        raise KeyError
    assert messages() == 1
    # Nothing else is lost by it: the block lives, so they load as unannounced ones.
    assert torch.equal(pickle.loads(blobs[0]).view(), torch.arange(5))
    assert messages() == 1
    load_times(kept, 1)
    assert messages() == 0


def test_an_exception_takes_back_only_what_its_own_readers_announced():
    handle = shmx.share(torch.arange(5))
    with shmx.readers(2):
        blob = pickle.dumps(handle)
        with contextlib.suppress(KeyError), shmx.readers(3):
            pickle.dumps(handle)
            assert messages() == 2
            raise KeyError
        assert messages() == 1
    assert messages() == 1
    load_times(blob, 2)
    assert messages() == 0


def test_an_exception_does_not_take_back_what_was_loaded():
    handle = shmx.share(torch.arange(5))
    with contextlib.suppress(KeyError), shmx.readers(1):
        loaded = pickle.loads(pickle.dumps(handle))
        later = pickle.dumps(handle)
        raise KeyError
    assert messages() == 0
    handle.release()
    assert torch.equal(loaded.view(), torch.arange(5))
    assert torch.equal(pickle.loads(later).view(), torch.arange(5))


def test_an_object_that_cannot_be_pickled_leaves_no_message():
    handle = shmx.share(torch.arange(5))
    with pytest.raises(TypeError), shmx.readers(3):
        pickle.dumps([handle, threading.Lock()])
    assert messages() == 0


def test_one_readers_object_serves_one_with_at_a_time():
    handle = shmx.share(torch.arange(5))
    context = shmx.readers(2)
    with context, pytest.raises(ValueError, match="in use already"), context:
        pass
    with context:
        blob = pickle.dumps(handle)
    load_times(blob, 2)
    assert messages() == 0


def test_readers_in_one_task_are_not_seen_in_another():
    handle = shmx.share(torch.arange(5))

    async def announces(entered: asyncio.Event, pickled: asyncio.Event) -> None:
        with shmx.readers(4):
            entered.set()
            await pickled.wait()
            load_times(pickle.dumps(handle), 4)

    async def does_not(entered: asyncio.Event, pickled: asyncio.Event) -> None:
        await entered.wait()
        blob = pickle.dumps(handle)
        assert messages() == 1
        load_times(blob, 1)
        assert messages() == 0
        pickled.set()

    async def both() -> None:
        entered, pickled = asyncio.Event(), asyncio.Event()
        await asyncio.gather(announces(entered, pickled), does_not(entered, pickled))

    asyncio.run(both())
    assert messages() == 0


def test_readers_in_one_thread_are_not_seen_in_another():
    handle = shmx.share(torch.arange(5))
    blobs: list[bytes] = []
    with shmx.readers(4):
        thread = threading.Thread(target=lambda: blobs.append(pickle.dumps(handle)))
        thread.start()
        thread.join()
    load_times(blobs[0], 1)
    assert messages() == 0


@pytest.mark.parametrize("count", [-1, 4096, 1 << 40])
def test_a_count_of_readers_out_of_range_is_a_value_error_that_tells_the_range(count):
    handle = shmx.share(torch.arange(5))
    for say in (shmx.readers, handle.with_readers):
        with pytest.raises(ValueError, match=f"between 0 and 4095, not {count}"):
            say(count)


@pytest.mark.parametrize("count", [1 << 63, -(1 << 70)])
def test_a_count_of_readers_beyond_64_bits_is_a_value_error(count):
    with pytest.raises(ValueError, match="between 0 and 4095"):
        shmx.readers(count)


def test_a_count_of_readers_that_is_no_integer_is_a_type_error():
    for wrong in ("2", None, 1.5):
        with pytest.raises(TypeError):
            shmx.readers(wrong)


# ---- handles without data


def released() -> shmx.SharedTensor:
    handle = shmx.share(torch.arange(5))
    handle.release()
    return handle


def stale() -> shmx.SharedTensor:
    arena = shmx.Arena(capacity=4096)
    handle = arena.share(torch.zeros(4096, dtype=torch.uint8))
    with shmx.readers(0):
        blob = pickle.dumps(handle)
    handle.release()
    arena.share(torch.zeros(4096, dtype=torch.uint8))
    return pickle.loads(blob)


def revoked() -> shmx.SharedTensor:
    handle = shmx.share(torch.arange(5))
    twin = copy.copy(handle)
    handle.revoke()
    return pickle.loads(pickle.dumps(twin))


def lost() -> shmx.SharedTensor:
    arena = shmx.Arena(capacity=1 << 20)
    handle = arena.share(torch.arange(5))
    with shmx.readers(0):
        blob = pickle.dumps(handle)
    handle.release()
    arena.close()
    return pickle.loads(blob)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (released, shmx.ReleasedError),
        (stale, shmx.StaleHandleError),
        (revoked, shmx.StaleHandleError),
        (lost, shmx.SegmentLostError),
    ],
)
@pytest.mark.parametrize("count", [None, 0, 3])
def test_a_handle_without_data_pickles_and_carries_the_reason_through_any_number_of_hops(make, error, count):
    """Rules 4 and 5."""
    handle = make()
    shape = handle.shape
    with shmx.readers(count) if count is not None else contextlib.nullcontext():
        for _ in range(6):
            with pytest.raises(error):
                handle.view()
            assert type(handle.error) is error
            assert not handle.is_available
            blob = pickle.dumps(handle)
            assert len(blob) <= 256
            handle = pickle.loads(blob)
    assert handle.shape == shape
    for use in (handle.view, handle.materialize, handle.numpy, lambda: handle.materialize_into(torch.empty(shape))):
        with pytest.raises((error, ValueError)):
            use()
    with pytest.raises(error):
        handle.materialize()
    assert shmx.discard(pickle.dumps(handle)) == 0


def test_a_revoked_handle_that_still_holds_reads_on_and_its_pickles_are_stale():
    handle = shmx.share(torch.arange(5))
    twin = copy.copy(handle)
    sent = pickle.dumps(twin)
    handle.revoke()
    assert messages() == 0
    assert torch.equal(twin.view(), torch.arange(5))
    for blob in (sent, pickle.dumps(twin)):
        with pytest.raises(shmx.StaleHandleError):
            pickle.loads(blob).view()


def test_one_handle_without_data_does_not_spoil_the_pickle_of_others():
    """Rule 5."""
    good, bad = shmx.share(torch.arange(5)), released()
    loaded = pickle.loads(pickle.dumps([good, bad, good]))
    assert torch.equal(loaded[0].view(), torch.arange(5))
    assert loaded[0] is loaded[2]
    assert isinstance(loaded[1].error, shmx.ReleasedError)


# ---- what belongs to its process


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", [shmx.Arena, shmx.readers])
def test_what_is_no_message_says_so_when_it_is_pickled(cls, protocol):
    with shmx.Arena(capacity=1 << 20) if cls is shmx.Arena else shmx.readers(2) as thing:
        for pickled in (lambda: pickle.dumps(thing, protocol), lambda: thing.__reduce_ex__(protocol), thing.__reduce__):
            with pytest.raises(
                TypeError, match=f"cannot pickle '{cls.__name__}' object: .*(pickle inside|send the handle)"
            ):
                pickled()


# ---- messages that will not be sent


@dataclasses.dataclass
class Request:
    text: str
    images: dict[str, shmx.SharedTensor]


def test_discard_takes_back_every_message_of_a_nested_pickle_once():
    first, second, third = (shmx.share(torch.full((5,), fill)) for fill in range(3))
    request = [Request("what is this?", {"a": first, "b": second.with_readers(7)}), (third, {"again": first})]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        blob = pickle.dumps(request, protocol)
        assert messages() == 3
        assert shmx.discard(blob) == 3
        assert messages() == 0
        assert shmx.discard(blob) == 0


def test_discard_leaves_other_messages_alone():
    handle = shmx.share(torch.arange(5))
    first, second = pickle.dumps(handle), pickle.dumps(handle)
    assert shmx.discard(first) == 1
    assert messages() == 1
    third = pickle.dumps(handle)
    assert shmx.discard(first) == 0
    assert messages() == 2
    load_times(second, 1)
    load_times(third, 1)
    assert messages() == 0


def test_discard_takes_what_to_bytes_gave():
    handle = shmx.share(torch.arange(5))
    state = handle.to_bytes()
    assert messages() == 1
    for carrier in (state, bytearray(state), memoryview(state)):
        assert shmx.discard(carrier) == (1 if carrier is state else 0)
        assert messages() == 0


def test_discard_takes_back_what_is_left_of_a_partly_loaded_message():
    with shmx.readers(3):
        blob = pickle.dumps(shmx.share(torch.arange(5)))
    load_times(blob, 2)
    assert shmx.discard(blob) == 1
    assert messages() == 0


def test_discard_of_a_loaded_message_or_of_no_message_takes_nothing():
    handle = shmx.share(torch.arange(5))
    blob = pickle.dumps(handle)
    load_times(blob, 1)
    assert shmx.discard(blob) == 0
    with shmx.readers(0):
        assert shmx.discard(pickle.dumps(handle)) == 0
    assert shmx.discard(pickle.dumps({"no": "handle"})) == 0


def test_discard_executes_nothing_of_the_pickle():
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("it was executed",))

    assert shmx.discard(pickle.dumps([Bomb(), shmx.share(torch.arange(5))])) == 1


@pytest.mark.parametrize("blob", [b"", b"garbage", b"\x80", b"SX", b"SX\x01garbage", b"\x80\x05X\xff\xff\xff\xff"])
def test_discard_of_garbage_is_an_invalid_handle(blob):
    with pytest.raises(shmx.InvalidHandleError):
        shmx.discard(blob)


def test_discard_passes_over_a_string_that_only_looks_like_a_handle():
    blob = pickle.dumps([_core.TEXT_PREFIX + " is how it begins", shmx.share(torch.arange(5))])
    assert shmx.discard(blob) == 1


def test_discard_of_a_message_of_a_lost_arena_takes_nothing():
    arena = shmx.Arena(capacity=1 << 20)
    handle = arena.share(torch.arange(5))
    blob = pickle.dumps(handle)
    assert shmx.discard(blob) == 1
    handle.release()
    arena.close()
    assert shmx.discard(blob) == 0
