"""SGLang 0.5.23 on shmx: its own functions, from the tokenizer's wrap to the ranks' materialized features."""

from __future__ import annotations

import copy
import os
import pickle
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from shmx.bench.turns import rotated

import shmx
from shmx.integrations import sglang as integration
from tests import sglang_engine
from tests.blocks import messages
from tests.forkserver import preloaded
from tests.patterns import is_pattern, pattern, press
from tests.sglang_engine import WAYS, Layout, Plan, route, serve, serve_in_turns, tokenize, tokenize_in_turns

pytestmark = pytest.mark.skipif(sglang_engine.why_not() is not None, reason=str(sglang_engine.why_not()))

LAYOUTS = {
    "tp2": Layout(2),
    "tp4": Layout(4),
    "dp-attention": Layout(4, dp=2),
    "pipeline": Layout(2, pp=2),
}


@pytest.fixture(scope="module", autouse=True)
def server():
    with preloaded("tests.sglang_preloaded"):
        yield
    for path in Path("/dev/shm").glob("sgl_shm_mm_*"):
        path.unlink()


def start(children, target, *arguments):
    return children.start(target, *arguments, method="forkserver")


def run(children, folder: Path, plan: Plan, routed: bool = False):
    """All ranks' outcomes added up, the barriers of all, and the tokenizer's answer."""
    at_ranks = folder / "routed" if routed else folder
    at_ranks.mkdir(exist_ok=True)
    workers = [start(children, tokenize, folder, plan)]
    if routed:
        workers.append(start(children, route, folder, at_ranks, plan))
    ranks = [start(children, serve, at_ranks, plan, rank) for rank in range(plan.layout.world)]
    for child in [*workers, *ranks]:
        assert child.receive() in ("sent", "routed", "done")
    for child in [*workers, *ranks]:
        child.send("end")
    outcomes = [rank.result() for rank in ranks]
    answer, *_ = [worker.result() for worker in workers]
    return sum((outcome for outcome, _ in outcomes), Counter()), sum(count for _, count in outcomes), answer


def copies(plan: Plan) -> int:
    """How many ranks receive each request."""
    return plan.layout.world // plan.layout.dp


def all_right(plan: Plan) -> Counter[str]:
    return Counter(right=plan.requests * plan.samples * copies(plan))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_owns_every_feature_and_no_barrier_is_called(children, tmp_path, name):
    plan = Plan(LAYOUTS[name])
    outcome, barriers, (inline, largest) = run(children, tmp_path, plan)
    assert (outcome, barriers, inline) == (all_right(plan), 0, 0)
    assert largest < 2048


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_none_of_2000_requests_is_lost(children, tmp_path, name):
    plan = Plan(LAYOUTS[name], requests=2000, work=40)
    outcome, barriers, (inline, _) = run(children, tmp_path, plan)
    print(f"{name}: shmx without a barrier, 2,000 requests: {dict(outcome)}")
    assert (outcome, barriers, inline) == (all_right(plan), 0, 0)


@pytest.mark.long
@pytest.mark.parametrize("name", ["tp2", "tp4"])
def test_sglangs_own_segments_lose_many_of_2000_without_the_barrier(children, tmp_path, name):
    plan = Plan(LAYOUTS[name], requests=2000, work=40, tokenizer=False, ranks=False, barrier=False)
    outcome, _, _ = run(children, tmp_path, plan)
    print(f"{name}: SGLang's own without the barrier, 2,000 requests: {dict(outcome)}")
    assert outcome["lost"] > 0.25 * outcome.total()


def test_sglangs_own_segments_are_lost_without_the_barrier(children, tmp_path):
    plan = Plan(Layout(2), tokenizer=False, ranks=False, barrier=False)
    outcome, barriers, _ = run(children, tmp_path, plan)
    assert outcome["lost"] > 0 and barriers > 0


def test_sglangs_own_segments_still_work_on_ranks_with_shmx_and_have_their_barrier(children, tmp_path):
    plan = Plan(Layout(2), tokenizer=False)
    outcome, barriers, _ = run(children, tmp_path, plan)
    assert outcome == all_right(plan)
    assert barriers > 0


@pytest.mark.parametrize("samples", [3, 12])
def test_n_samples_all_arrive(children, tmp_path, samples):
    plan = Plan(Layout(2), requests=12, samples=samples)
    outcome, _, _ = run(children, tmp_path, plan)
    assert outcome == all_right(plan)


def test_a_router_passes_handles_on(children, tmp_path):
    plan = Plan(Layout(2))
    outcome, _, _ = run(children, tmp_path, plan, routed=True)
    assert outcome == all_right(plan)


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, pp=2)], ids=["tp2", "pipeline"])
def test_the_pickle_codec_works_as_well(children, tmp_path, layout):
    plan = Plan(layout, pickled=True)
    outcome, barriers, _ = run(children, tmp_path, plan)
    assert (outcome, barriers) == (all_right(plan), 0)


def test_several_nodes_need_no_inline_features(children, tmp_path):
    plan = Plan(Layout(2, nodes=2))
    outcome, _, (inline, _) = run(children, tmp_path, plan)
    assert (outcome, inline) == (all_right(plan), 0)


@pytest.mark.parametrize("fault", ["revoked", "refused"])
@pytest.mark.parametrize("name", ["tp4", "dp-attention"])
def test_a_request_that_is_lost_anywhere_fails_on_all_ranks_and_alone(children, tmp_path, name, fault):
    # The second group's first request is number 1.
    plan = Plan(LAYOUTS[name], **{fault: 20})
    outcome, _, _ = run(children, tmp_path, plan)
    assert outcome == all_right(plan) + Counter(lost=copies(plan)) - Counter(right=copies(plan))


def test_a_full_arena_sends_features_inline_and_loses_none(children, tmp_path):
    plan = Plan(Layout(2), capacity=512 << 10)
    outcome, _, (inline, _) = run(children, tmp_path, plan)
    # The first rank publishes for the others what came to it inline.
    assert outcome == all_right(plan) + Counter({"copied by a rank": 1})
    assert inline > 0


# ---- the pointer, in one process


def in_package(children, target):
    return start(children, in_installed_package, target).result()


def in_installed_package(connection, target):
    sgl = sglang_engine.configure(on_shmx=True)
    return target(sgl)


def round_trips(sgl):
    tensor = pattern(1).reshape(16, -1)
    pointer = sgl.mm.ShmPointerMMData(tensor, precomputed_hash=7)
    state = pointer.__getstate__()
    decoded = sgl.mm.ShmPointerMMData.__new__(sgl.mm.ShmPointerMMData)
    decoded.__setstate__(state)
    ways = [decoded, pickle.loads(pickle.dumps(pointer)), copy.copy(pointer), copy.deepcopy(pointer)]
    for one in ways:
        assert (one.shape, one.dtype, one.precomputed_hash) == (tensor.shape, tensor.dtype, 7)
        assert isinstance(one.shm_name, str) and one._materialization_error is None
        assert torch.equal(one.tensor, tensor) and sgl.mm.hash_feature(one) == 7
        own = one.materialize()
        assert torch.equal(own, tensor) and one.tensor is None
        own.fill_(0)
        one.close_and_unlink()
        one.close_and_unlink()
    pointer.close_and_unlink()
    assert messages() == 0 and shmx.stats()["arena"]["held_blocks"] == 1  # the tensor lives
    del tensor
    assert shmx.stats()["arena"]["held_blocks"] == 0
    return set(state)


def test_the_pointer_has_the_surface_of_sglangs(children):
    assert in_package(children, round_trips) == {"shm_name", "shape", "dtype", "precomputed_hash"}


def publish_again_and_again(sgl):
    shmx.configure(reuse_delay=0)
    for number in range(5):
        pointer = sgl.mm.ShmPointerMMData(pattern(number))
        received = pickle.loads(pickle.dumps(pointer))
        decoded = sgl.mm.ShmPointerMMData.__new__(sgl.mm.ShmPointerMMData)
        decoded.__setstate__(pointer.__getstate__())
        for one in (received, decoded):
            assert is_pattern(one.materialize(), number)
        pointer.close_and_unlink()
    return shmx.stats()["arena"]["blocks"]


def test_a_block_whose_features_have_been_taken_is_used_again(children):
    assert in_package(children, publish_again_and_again) == 1


def share_samples(sgl):
    shmx.configure(capacity=2 << 20, segment_bytes=2 << 20)
    tensor = pattern(5)
    pointers = [sgl.mm.ShmPointerMMData(tensor, precomputed_hash=3) for _ in range(3)]
    states = [pointer.__getstate__() for pointer in pointers]
    blocks = shmx.stats()["arena"]["held_blocks"]
    tensor.add_(1)
    other = sgl.mm.ShmPointerMMData(tensor, precomputed_hash=3)
    assert shmx.stats()["arena"]["held_blocks"] == 2
    del tensor, other, pointers
    press(shmx.default_arena())
    for state in states:
        one = sgl.mm.ShmPointerMMData.__new__(sgl.mm.ShmPointerMMData)
        one.__setstate__(state)
        assert is_pattern(one.materialize(), 5)
    return blocks


def test_samples_of_one_tensor_share_a_block_until_it_is_written_to(children):
    assert in_package(children, share_samples) == 1


def send_twenty(sgl):
    shmx.configure(capacity=2 << 20, segment_bytes=2 << 20)
    tensor = pattern(6)
    states = [sgl.mm.ShmPointerMMData(tensor).__getstate__() for _ in range(20)]
    del tensor
    found = []
    for number, state in enumerate(states):
        # Also after the ten that fit into one block.
        if number in (0, 10):
            press(shmx.default_arena())
        one = sgl.mm.ShmPointerMMData.__new__(sgl.mm.ShmPointerMMData)
        one.__setstate__(state)
        found.append(is_pattern(one.materialize(), 6))
    return found


def test_more_samples_than_messages_fit_a_block_are_all_announced(children):
    assert in_package(children, send_twenty) == [True] * 20


def open_lost(connection, state):
    sgl = sglang_engine.configure(on_shmx=True)
    lost = sgl.mm.ShmPointerMMData.__new__(sgl.mm.ShmPointerMMData)
    lost.__setstate__(state)
    forwarded = pickle.loads(pickle.dumps(lost))
    errors = []
    for one in (lost, forwarded):
        with pytest.raises(RuntimeError) as raised:
            one.materialize()
        errors.append(str(raised.value))
        one.close_and_unlink()
    return errors


def own_and_lose(connection):
    sgl = sglang_engine.configure(on_shmx=True)
    state = sgl.mm.ShmPointerMMData(pattern(1)).__getstate__()
    for name in os.listdir("/dev/shm"):
        if name.startswith(shmx.default_arena().name.removeprefix("/")):
            os.unlink(f"/dev/shm/{name}")
    connection.send(state)
    connection.recv()


def test_decoding_a_lost_segment_raises_nothing_and_materializing_says_which(children):
    owner = start(children, own_and_lose)
    state = owner.receive()
    errors = start(children, open_lost, state).result()
    owner.send("end")
    owner.result()
    assert all("SegmentLostError" in error and "/shmx-" in error for error in errors)


def decode_garbage(sgl):
    for name in ("U1gBnonsense", "", "U1gB", 5, None, "no-such-segment"):
        state = {"shm_name": name, "shape": torch.Size([1]), "dtype": torch.float32}
        one = sgl.mm.ShmPointerMMData.__new__(sgl.mm.ShmPointerMMData)
        one.__setstate__(state)
        with pytest.raises(RuntimeError):
            one.materialize()
    return True


def test_decoding_garbage_raises_nothing(children):
    assert in_package(children, decode_garbage)


def decoded(sgl, name, tensor):
    one = sgl.mm.ShmPointerMMData.__new__(sgl.mm.ShmPointerMMData)
    one.__setstate__({"shm_name": name, "shape": tensor.shape, "dtype": tensor.dtype, "precomputed_hash": 7})
    return one


def passed_on(sgl, pointer):
    """What comes of a pointer in the next process, by pickle and in a request by msgpack."""
    request = sglang_engine.request(1, [pointer])
    request.wrap_pickle_fields()
    (item,) = sgl.io.msgpack_decode(sgl.io.msgpack_encode(request)).mm_inputs.mm_items
    return pickle.loads(pickle.dumps(pointer)), item.feature


def pass_on_what_cannot_be_opened(sgl):
    found = []
    for name in (None, 5, b"U1gB", "", "U1gBnonsense", "no-such-segment"):
        first = decoded(sgl, name, pattern(1))
        for one in (first, *passed_on(sgl, first)):
            with pytest.raises(RuntimeError):
                one.materialize()
            found.append((name, one._is_sglangs))
    return found


def test_whether_a_segment_is_sglangs_is_the_same_wherever_the_pointer_has_been(children):
    found = in_package(children, pass_on_what_cannot_be_opened)
    assert found == [(name, name == "no-such-segment") for name, _ in found]


def pass_on_an_inline_tensor(sgl):
    pointer = decoded(sgl, pattern(3), pattern(3))
    for one in (*passed_on(sgl, pointer), copy.copy(pointer), copy.deepcopy(pointer), pointer):
        assert not one._is_sglangs and one.precomputed_hash == 7
        assert is_pattern(one.materialize(), 3)
        one.close_and_unlink()
    return [one._is_sglangs for one in passed_on(sgl, pointer)]


def test_a_pointer_keeps_its_inline_tensor_when_it_is_passed_on(children):
    assert in_package(children, pass_on_an_inline_tensor) == [False, False]


def be_full(sgl):
    shmx.configure(capacity=64 << 10)
    with pytest.raises(OSError) as raised:
        sgl.mm.ShmPointerMMData(pattern(1, 1 << 20))
    return raised.value.errno, type(sgl.mm._wrap_shm_or_inline(pattern(1, 1 << 20))).__name__


def test_no_room_is_enospc_and_sglang_goes_inline(children):
    assert in_package(children, be_full) == (28, "Tensor")


def give_handles_up(sgl):
    shmx.configure(capacity=1 << 20, segment_bytes=1 << 20)
    kept = [pattern(number, 256 << 10) for number in range(8)]
    for number, tensor in enumerate(kept):
        state = sgl.mm.ShmPointerMMData(tensor).__getstate__()
        one = sgl.mm.ShmPointerMMData.__new__(sgl.mm.ShmPointerMMData)
        one.__setstate__(state)
        assert is_pattern(one.materialize(), number)
    return True


def test_handles_kept_for_further_samples_go_when_memory_is_short(children):
    assert in_package(children, give_handles_up)


# ---- install


def install_and_uninstall(connection):
    sgl = sglang_engine.load()
    import sglang.srt.distributed.communication_op as communication
    import sglang.srt.utils as utils

    def everything():
        receiver = sgl.receiver
        return [
            *(sgl.mm.ShmPointerMMData, sgl.mm._get_is_default_transport, receiver.barrier),
            *(sgl.common.broadcast_pyobj, utils.broadcast_pyobj, receiver.broadcast_pyobj),
            *(communication.broadcast_pyobj, sgl.common.point_to_point_pyobj, receiver.point_to_point_pyobj),
            *(sgl.pipeline.point_to_point_pyobj, receiver.SchedulerRequestReceiver._finalize_shm_features),
        ]

    before = everything()
    integration.install()
    first = everything()
    integration.install()
    second = everything()
    integration.uninstall()
    integration.uninstall()
    return (
        all(old is not new for old, new in zip(before, first, strict=True)),
        all(one is same for one, same in zip(first, second, strict=True)),
        all(old is now for old, now in zip(before, everything(), strict=True)),
    )


def test_install_replaces_every_reference_and_uninstall_puts_all_back(children):
    assert start(children, install_and_uninstall).result() == (True, True, True)


def load_as_plugin(connection, setting):
    sglang_engine.load()
    from sglang.srt.plugins import load_plugins

    os.environ["SHMX_SGLANG"] = setting
    load_plugins()
    return integration.installed()


@pytest.mark.parametrize("setting", ["0", "1"])
def test_sglang_loads_it_as_a_plugin_if_asked_to(children, setting):
    assert start(children, load_as_plugin, setting).result() is (setting == "1")


@pytest.mark.long
def test_196_mb_to_4_ranks_against_sglangs_own_and_inline(children, tmp_path):
    """Prints until when the last rank had read its features once; all take turns in the same processes."""
    layout, images, size, rounds = Layout(4), 8, 24 << 20, 6
    tokenizer = start(children, tokenize_in_turns, tmp_path, images, size)
    ranks = [start(children, serve_in_turns, tmp_path, layout, rank, images, size) for rank in range(layout.world)]
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    largest: Counter[str] = Counter()
    # Twice before the first round, so that there is memory for two requests at a time.
    twice = [way for way in WAYS for _ in range(2)]
    for number in range(rounds + 1):
        for way in rotated(WAYS, number) if number > 0 else twice:
            for rank in ranks:
                rank.send(way)
            assert [rank.receive() for rank in ranks] == ["ready"] * layout.world
            tokenizer.send((way, number))
            began, sent = tokenizer.receive()
            answers = [rank.receive() for rank in ranks]
            assert {outcome for _, outcome in answers} == {"right"}
            largest[way] = max(largest[way], sent)
            if number > 0:
                times[way].append((max(read for read, _ in answers) - began) / 1e6)
    for child in [tokenizer, *ranks]:
        child.send(None)
    for child in [tokenizer, *ranks]:
        child.result()
    ours = times["shmx"]
    for way, found in times.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(found, ours, strict=True))
        print(f"{way}: median {statistics.median(found):.1f} ms, {ratio:.2f}x shmx, {largest[way]} bytes by ZMQ")
    assert largest["shmx"] < 10_000
