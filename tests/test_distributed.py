"""shmx.distributed on one host: the semantics of torch.distributed, over real gloo groups."""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import os
import pickle
import signal
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import shmx
from shmx import distributed
from shmx.pickling import take_apart
from tests.blocks import messages
from tests.children import BOUND
from tests.forkserver import preloaded
from tests.patterns import is_pattern, pattern

SIZE = 256 << 10


@pytest.fixture(scope="module", autouse=True)
def server():
    with preloaded("tests.test_distributed"):
        yield


def join(folder, rank, world):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/gloo",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=BOUND),
    )


def everywhere(children, folder, target, *arguments, world=3):
    """What ``target(rank, *arguments)`` returns on every rank."""
    ranks = [
        children.start(on_rank, folder, rank, world, target, arguments, method="forkserver") for rank in range(world)
    ]
    return [rank.result() for rank in ranks]


def on_rank(connection, folder, rank, world, target, arguments):
    join(folder, rank, world)
    try:
        return target(rank, *arguments)
    finally:
        dist.barrier()
        dist.destroy_process_group()


@dataclass
class Request:
    number: int
    features: list[Any]
    note: str = ""


class Broken:
    """Cannot be restored by the ranks in its list."""

    def __init__(self, ranks):
        self.ranks = ranks

    def __reduce__(self):
        return restore_broken, (self.ranks,)


def restore_broken(ranks):
    if dist.get_rank() in ranks:
        raise LookupError("broken on purpose")
    return Broken(ranks)


def is_request(value, number):
    tensor, array, small = value.features
    return (
        (value.number, value.note) == (number, "n" * number)
        and is_pattern(tensor, number)
        and is_pattern(torch.from_numpy(array), number + 1)
        and torch.equal(small, torch.arange(number))
    )


def make_request(number, size=SIZE):
    array = pattern(number + 1, size).numpy()
    return Request(number, [pattern(number, size), array, torch.arange(number)], "n" * number)


# ---- what arrives


def fill_in_place(rank, source, by_group_rank):
    objects = [make_request(5), {"a": (1, "two")}, None] if rank == source else [None, "old", 3]
    same = objects
    where = {"group_src": source} if by_group_rank else {"src": source}
    distributed.broadcast_object_list(objects, **where)
    return same is objects and is_request(objects[0], 5) and objects[1:] == [{"a": (1, "two")}, None]


@pytest.mark.parametrize("source", [0, 2])
@pytest.mark.parametrize("by_group_rank", [False, True])
def test_the_list_is_filled_in_place_on_every_rank(children, tmp_path, source, by_group_rank):
    assert everywhere(children, tmp_path, fill_in_place, source, by_group_rank) == [True] * 3


def send_in_part_of_the_world(rank):
    group = dist.new_group([1, 2])
    objects = [make_request(rank)] if rank == 2 else [None]
    distributed.broadcast_object_list(objects, src=2, group=group)
    return objects[0] is None if rank == 0 else is_request(objects[0], 2)


def test_src_is_a_global_rank_and_ranks_outside_of_the_group_keep_their_list(children, tmp_path):
    assert everywhere(children, tmp_path, send_in_part_of_the_world) == [True] * 3


def write_to_what_came(rank):
    tensor = pattern(1)
    objects = [[tensor, tensor, tensor.numpy().copy()]] if rank == 0 else [None]
    distributed.broadcast_object_list(objects)
    mine = objects[0]
    same = mine[0] is mine[1]
    if rank:
        mine[0].fill_(rank)
        mine[2][:] = rank
    dist.barrier()
    expected = 1 if rank == 0 else None
    kept = is_pattern(mine[0], 1) if expected else bool((mine[0] == rank).all() and (mine[2] == rank).all())
    return same and kept and messages_or_none() == 0


def messages_or_none():
    arena = shmx.stats()["arena"]
    return arena["messages"] if arena else 0


def test_every_rank_may_write_to_its_own_and_shared_references_stay_shared(children, tmp_path):
    assert everywhere(children, tmp_path, write_to_what_came) == [True] * 3


def send_all_kinds(rank):
    base = torch.arange(64 * 1024.0).reshape(256, 256)
    frozen = np.arange(20_000)
    frozen.flags.writeable = False
    kinds = {
        "transposed": base.t(),
        "grad": base.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(base.clone()),
        "conj": torch.complex(base, base).conj(),
        "sparse": base.to_sparse(),
        "half": base.bfloat16(),
        "bool": base > 5,
        "frozen": frozen,
        "fortran": np.asfortranarray(base.numpy()),
        "objects": np.array([{"a": 1}] * 10_000, dtype=object),
        "strings": np.array(["text"] * 10_000),
        "empty": torch.zeros(0, 3),
        "bytes": bytearray(b"x" * 100_000),
    }
    objects = [kinds] if rank == 0 else [None]
    distributed.broadcast_object_list(objects)
    found = objects[0]
    assert found["grad"].requires_grad and type(found["parameter"]) is torch.nn.Parameter
    assert found["transposed"].stride() == base.t().stride()
    for name, value in kinds.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name].to_dense(), value.to_dense()), name
        else:
            assert np.array_equal(found[name], value) and type(found[name]) is type(value), name
    return True


def test_whatever_cannot_leave_the_pickle_stays_in_it(children, tmp_path):
    assert everywhere(children, tmp_path, send_all_kinds, world=2) == [True] * 2


def send_handles(rank):
    handles = [*shmx.share_many([pattern(1), pattern(2)]), shmx.share(pattern(3))] if rank == 0 else []
    objects = [handles] if rank == 0 else [None]
    distributed.broadcast_object_list(objects)
    if rank == 0:
        for handle in handles:
            handle.release()
    dist.barrier()
    return rank == 0 or all(is_pattern(handle.view(), seed) for seed, handle in enumerate(objects[0], 1))


def test_handles_stay_handles_and_outlive_their_source(children, tmp_path):
    assert everywhere(children, tmp_path, send_handles) == [True] * 3


# ---- what it costs


class Counted:
    """Calls and bytes of collectives."""

    def __init__(self):
        self.sizes = []
        self.original = dist.broadcast

    def __enter__(self):
        dist.broadcast = self.broadcast
        return self

    def broadcast(self, tensor, *arguments, **options):
        self.sizes.append(tensor.nbytes)
        return self.original(tensor, *arguments, **options)

    def __exit__(self, *_):
        dist.broadcast = self.original


def count_collectives(rank, tensors):
    content = [pattern(seed, 1 << 20) for seed in range(tensors)]
    objects = [content] if rank == 0 else [None]
    distributed.broadcast_object_list(objects)
    with Counted() as counted:
        distributed.broadcast_object_list(objects)
    if rank == 0:
        assert shmx.stats()["arena"]["messages"] <= 2
    return len(counted.sizes), sum(counted.sizes)


def test_32_tensors_are_one_collective_of_8_kib(children, tmp_path):
    assert everywhere(children, tmp_path, count_collectives, 32) == [(1, 8192)] * 3


def test_what_does_not_fit_takes_a_second_collective(children, tmp_path):
    results = everywhere(children, tmp_path, count_collectives, 300)
    assert {calls for calls, _ in results} == {2}
    assert results[0] == results[1] == results[2]


def read_late(rank, rounds):
    outcome = []
    for number in range(rounds):
        objects = [pattern(number)] if rank == 0 else [None]
        distributed.broadcast_object_list(objects)
        outcome.append(is_pattern(objects[0], number))
    if rank == 0:
        dist.barrier()
        return all(outcome) and shmx.stats()["arena"]["messages"] == 0
    dist.barrier()
    return all(outcome)


def test_readers_are_announced_exactly_and_nothing_waits(children, tmp_path):
    assert everywhere(children, tmp_path, read_late, 200) == [True] * 3


# ---- failures


def broadcast_again_and_again(rank):
    for number in range(5):
        objects = [pattern(number, SIZE)] if rank == 0 else [None]
        distributed.broadcast_object_list(objects)
        assert is_pattern(objects[0], number)
        dist.barrier()
    return shmx.stats()["arena"]["blocks"] if rank == 0 else None


@pytest.mark.parametrize("world", [1, 3])
def test_a_block_that_all_ranks_have_loaded_is_used_again(children, tmp_path, world):
    assert everywhere(children, tmp_path, broadcast_again_and_again, world=world)[0] == 1


def disagree(rank):
    failed = distributed.agree([rank == 1, False, rank == 2, False])
    return failed, distributed.agree([])


def test_all_ranks_agree_on_what_has_failed_anywhere(children, tmp_path):
    assert everywhere(children, tmp_path, disagree) == [([True, False, True, False], [])] * 3


def agree_outside_of_the_group(rank):
    group = dist.new_group([0])
    try:
        return distributed.agree([True], group)
    except ValueError as error:
        return str(error)


def test_a_rank_outside_of_the_group_cannot_agree(children, tmp_path):
    inside, outside = everywhere(children, tmp_path, agree_outside_of_the_group, world=2)
    assert (inside, outside) == ([True], "this rank is not in the group; let only its ranks call")


def receive_broken(rank, on_error):
    objects = [make_request(1), Broken([1]), make_request(2)] if rank == 0 else [None] * 3
    try:
        distributed.broadcast_object_list(objects, on_error=on_error)
    except LookupError as error:
        raised = str(error)
    else:
        raised = ""
    healthy = is_request(objects[0], 1) and is_request(objects[2], 2)
    failed = distributed.agree([isinstance(one, Exception) for one in objects])
    return healthy, raised, failed


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_an_object_that_fails_on_one_rank_leaves_the_others_alone(children, tmp_path, on_error):
    raised = "broken on purpose" if on_error == "raise" else ""
    mask = [False, True, False]
    assert everywhere(children, tmp_path, receive_broken, on_error) == [
        (True, "", mask),
        (True, raised, mask),
        (True, "", mask),
    ]


def keep_the_error(rank, on_error):
    gc.disable()
    objects = [shmx.share(pattern(1)), [pattern(2), Broken([1, 2])]] if rank == 0 else [None, None]
    kept = None
    try:
        distributed.broadcast_object_list(objects, on_error=on_error)
    except LookupError as error:
        kept = error
    assert rank == 0 or "on purpose" in str(kept or objects[1])
    held = [held_by_all(rank)]
    objects.pop(0)
    held.append(held_by_all(rank))
    del kept, objects
    return held


def drop_the_error(rank):
    gc.disable()
    objects = [shmx.share(pattern(1)), Broken([1, 2])] if rank == 0 else [None, None]
    with contextlib.suppress(LookupError):
        distributed.broadcast_object_list(objects)
    del objects
    return held_by_all(rank)


def held_by_all(rank):
    dist.barrier()
    held = shmx.stats()["arena"]["held_blocks"] if rank == 0 else None
    dist.barrier()
    return held


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_an_error_that_somebody_keeps_holds_no_block(children, tmp_path, on_error):
    # That of the handle among the objects, as long as those live.
    assert everywhere(children, tmp_path, keep_the_error, on_error)[0] == [1, 0]


def test_no_hold_waits_for_a_garbage_collection_where_an_object_has_failed(children, tmp_path):
    assert everywhere(children, tmp_path, drop_the_error)[0] == 0


def fail_to_fan_out(rank):
    gc.disable()
    handles = [shmx.share(pattern(1)), shmx.share(pattern(2))]
    handles[1].release()
    with contextlib.suppress(shmx.ReleasedError):
        distributed.fan_out(handles, "cpu")
    del handles
    return shmx.stats()["arena"]["held_blocks"]


def test_a_fan_out_that_has_failed_holds_no_block(children, tmp_path):
    assert everywhere(children, tmp_path, fail_to_fan_out, world=2) == [0, 0]


def send_revoked(rank):
    handle = shmx.share(pattern(1)) if rank == 0 else None
    if handle is not None:
        other = handle.with_readers(0)
        handle.revoke()
        objects = [{"gone": other}, "healthy"]
    else:
        objects = [None, None]
    distributed.broadcast_object_list(objects)
    return rank == 0 or (type(objects[0]["gone"].error).__name__, objects[1])


def test_a_handle_without_data_arrives_with_its_reason(children, tmp_path):
    _, *others = everywhere(children, tmp_path, send_revoked)
    assert others == [("StaleHandleError", "healthy")] * 2


def send_with_a_full_arena(rank):
    shmx.configure(capacity=128 << 10)
    objects = [make_request(4)] if rank == 0 else [None]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        distributed.broadcast_object_list(objects)
    said = [str(one.message) for one in warned if "arena is full" in str(one.message)]
    return is_request(objects[0], 4) and len(said) == (rank == 0)


def test_a_full_arena_sends_the_tensors_inline(children, tmp_path):
    assert everywhere(children, tmp_path, send_with_a_full_arena) == [True] * 3


def send_too_many(rank):
    objects = [1, 2] if rank == 0 else [None]
    if rank == 0:
        distributed.broadcast_object_list(objects)
        return True
    with pytest.raises(ValueError, match=r"broadcast 2 objects.*room for 1.*equal length"):
        distributed.broadcast_object_list(objects)
    return objects == [None]


def test_lists_of_different_lengths_are_a_clear_error(children, tmp_path):
    assert everywhere(children, tmp_path, send_too_many) == [True] * 3


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="on_error='ignore' is neither"):
        distributed.broadcast_object_list([1], on_error="ignore")
    with pytest.raises(ValueError, match="init_process_group"):
        distributed.broadcast_object_list([1])
    join(tmp_path, 0, 1)
    try:
        with pytest.raises(ValueError, match="not both"):
            distributed.broadcast_object_list([1], src=0, group_src=0)
        objects = [pattern(3)]
        distributed.broadcast_object_list(objects)
        assert is_pattern(objects[0], 3) and messages() == 0
    finally:
        dist.destroy_process_group()


def test_a_stream_without_its_tensors_is_an_error_that_says_so():
    stream = io.BytesIO()
    distributed._Numbered(stream, []).dump([shmx.share(pattern(1))])
    with pytest.raises(shmx.InvalidHandleError, match=r"shmx\.distributed alone"):
        pickle.loads(stream.getvalue())


def broadcast_by_a_missing_device(rank):
    distributed.broadcast_object_list([None])
    objects = [pattern(1)] if rank == 0 else [None]
    # A CUDA build has no other accelerator; torch asserts it.
    with pytest.raises(AssertionError, match="not compiled"):
        distributed.broadcast_object_list(objects, device="xpu")
    return messages_or_none()


def test_a_broadcast_that_fails_for_whatever_reason_leaves_no_message(children, tmp_path):
    assert everywhere(children, tmp_path, broadcast_by_a_missing_device, world=2) == [0, 0]


def survive(connection, folder, rank, world):
    """Broadcast until the group breaks; what is on its way then."""
    join(folder, rank, world)
    number = 0
    try:
        while True:
            objects = [make_request(number)] if rank == 0 else [None]
            distributed.broadcast_object_list(objects)
            if number == 20:
                connection.send("under way")
            number += 1
    except RuntimeError:
        left = messages_or_none()
    # Nobody else goes on with this group, and its destruction would wait for the dead.
    return left


def test_a_killed_rank_leaves_no_message(children, tmp_path):
    ranks = [children.start(survive, tmp_path, rank, 3, method="forkserver") for rank in range(3)]
    for rank in ranks:
        assert rank.receive() == "under way"
    os.kill(ranks[1].pid, signal.SIGKILL)
    ranks[1].join()
    assert ranks[0].result() == 0
    ranks[2].kill()


def test_no_hold_waits_for_a_garbage_collection():
    gc.disable()
    try:
        handles: list[shmx.SharedTensor] = []
        stream = io.BytesIO()
        distributed._Numbered(stream, handles).dump(take_apart([pattern(1)], None))
        (restored,) = distributed._Load(stream.getvalue(), handles)()
        assert shmx.stats()["arena"]["held_blocks"] == 1
        handles.clear()
        assert shmx.stats()["arena"]["held_blocks"] == 0
        assert is_pattern(restored, 1)
    finally:
        gc.enable()


def send_views(rank):
    base = pattern(1).reshape(64, -1)
    objects = [[base, base[3:5], base.t()]] if rank == 0 else [None]
    distributed.broadcast_object_list(objects)
    whole, rows, turned = objects[0]
    if rank:
        whole[4, 0] = -5
    return rank == 0 or (int(rows[1, 0]), int(turned[0, 4])) == (-5, -5)


def test_views_of_one_tensor_stay_views_of_one(children, tmp_path):
    assert everywhere(children, tmp_path, send_views, world=2) == [True] * 2
