"""shmx.distributed across hosts: bytes cross once to each, over real gloo between network and mount namespaces."""

from __future__ import annotations

import datetime
import os
import pickle
import warnings
import zlib

import pytest
import torch
import torch.distributed as dist

import shmx
from shmx import distributed
from tests import hosts as namespaces
from tests.children import BOUND
from tests.forkserver import preloaded
from tests.hosts import Hosts, enter
from tests.patterns import is_pattern, pattern

_REASON = namespaces.why_not()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

MIB = 1 << 20
# Ranks 0 and 1 on the first host, 2 and 3 on the second.
PLACES = (0, 0, 1, 1)


@pytest.fixture
def two_hosts(request):
    made = Hosts(getattr(request, "param", (256 * MIB, 256 * MIB)))
    yield made
    made.end()


@pytest.fixture(scope="module", autouse=True)
def server():
    with preloaded("tests.test_hosts"):
        yield


def on_host(connection, pid, interface, target, arguments):
    enter(pid, interface)
    return target(connection, *arguments)


def start_on(children, host, target, *arguments):
    return children.start(on_host, host.pid, host.interface, target, arguments, method="forkserver")


def start(children, two_hosts, folder, target, *arguments):
    return [
        start_on(children, two_hosts.hosts[place], target, folder, rank, *arguments)
        for rank, place in enumerate(PLACES)
    ]


def join(folder, rank, timeout=BOUND):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/gloo",
        rank=rank,
        world_size=len(PLACES),
        timeout=datetime.timedelta(seconds=timeout),
    )


def broadcast_on_demand(connection, folder, rank, source, capacity=None):
    """For each line one broadcast; answers whether what came is right, and how much of it came as handles."""
    if capacity is not None:
        shmx.configure(capacity=capacity)
    join(folder, rank)
    connection.send("ready")
    while (order := connection.recv()) != "end":
        number, sizes = order
        tensors = [pattern(number + index, size) for index, size in enumerate(sizes)]
        objects = [None, None]
        if rank == source:
            # Both ways to send: tensors that come back as tensors, and handles that come back as handles.
            objects = [{"number": number, "tensors": tensors[:-1]}, shmx.share(tensors[-1])]
        distributed.broadcast_object_list(objects, source)
        request, handle = objects
        last = handle.view() if isinstance(handle, shmx.SharedTensor) else handle
        found = [*request["tensors"], last]
        right = len(found) == len(sizes) and all(
            tensor.nbytes == size and is_pattern(tensor, number + index)
            for index, (tensor, size) in enumerate(zip(found, sizes, strict=True))
        )
        del objects, request, handle, last, found
        connection.send(right)
    dist.barrier()
    dist.destroy_process_group()


def one_round(ranks, number, sizes):
    for rank in ranks:
        rank.send([number, sizes])
    return [rank.receive() for rank in ranks]


def finish(two_hosts, ranks):
    for rank in ranks:
        rank.send("end")
    for rank in ranks:
        rank.result()
    assert two_hosts.names() == [set(), set()]


@pytest.mark.parametrize("source", [0, 3])
def test_bytes_cross_once_to_the_other_host_whoever_sends(children, two_hosts, tmp_path, source):
    ranks = start(children, two_hosts, tmp_path, broadcast_on_demand, source)
    assert [rank.receive() for rank in ranks] == ["ready"] * 4
    sizes = [4 * MIB, 8 * MIB, 65536, 4 * MIB]
    assert one_round(ranks, 1, sizes) == [True] * 4
    other = two_hosts.hosts[1 - PLACES[source]]
    before = other.received_bytes()
    for number in range(2, 7):
        assert one_round(ranks, number, sizes) == [True] * 4
    crossed = other.received_bytes() - before
    # Frames have headers, and metadata goes to every rank.
    assert 1.0 <= crossed / (5 * sum(sizes)) < 1.05
    finish(two_hosts, ranks)


def gather_hosts(connection, folder, rank):
    join(folder, rank)
    connection.send(distributed._Channel(dist.group.WORLD, None).hosts.ranks)
    dist.barrier()
    dist.destroy_process_group()


def test_hosts_are_told_apart_by_their_shared_memory(children, two_hosts, tmp_path):
    ranks = start(children, two_hosts, tmp_path, gather_hosts)
    assert [rank.receive() for rank in ranks] == [((0, 1), (2, 3))] * 4
    for rank in ranks:
        rank.result()


def broadcast_with_torch(connection, folder, rank):
    join(folder, rank)
    connection.send("ready")
    connection.recv()
    objects = [pattern(1, 8 * MIB)] if rank == 0 else [None]
    dist.broadcast_object_list(objects)
    connection.send(zlib.crc32(objects[0].numpy().data))
    dist.barrier()
    dist.destroy_process_group()


def test_the_counter_sees_what_torch_sends_to_each_rank(children, two_hosts, tmp_path):
    ranks = start(children, two_hosts, tmp_path, broadcast_with_torch)
    assert [rank.receive() for rank in ranks] == ["ready"] * 4
    before = two_hosts.hosts[1].received_bytes()
    for rank in ranks:
        rank.send("go")
    assert len({rank.receive() for rank in ranks}) == 1
    assert (two_hosts.hosts[1].received_bytes() - before) / (8 * MIB) > 1.0
    for rank in ranks:
        rank.result()


@pytest.mark.parametrize(
    ("two_hosts", "sizes"),
    [((256 * MIB, 2 * MIB), [4 * MIB, 128 << 10, 3 * MIB]), ((256 * MIB, 16 << 10), [MIB, 0])],
    indirect=["two_hosts"],
    ids=["too-little", "none, and an empty tensor"],
)
def test_a_host_without_room_passes_the_bytes_on(children, two_hosts, tmp_path, sizes):
    ranks = start(children, two_hosts, tmp_path, broadcast_on_demand, 0)
    assert [rank.receive() for rank in ranks] == ["ready"] * 4
    for number in (1, 2, 3):
        assert one_round(ranks, number, sizes) == [True] * 4
    finish(two_hosts, ranks)


def broadcast_with_another_default_device(*arguments):
    with torch.device("meta"):
        broadcast_on_demand(*arguments)


@pytest.mark.parametrize("two_hosts", [(256 * MIB, 256 * MIB), (256 * MIB, 2 * MIB)], indirect=True)
def test_the_default_device_does_not_matter(children, two_hosts, tmp_path):
    ranks = start(children, two_hosts, tmp_path, broadcast_with_another_default_device, 0)
    assert [rank.receive() for rank in ranks] == ["ready"] * 4
    # As many as take a second collective, and large ones.
    assert one_round(ranks, 1, [MIB, *[64 << 10] * 200, 3 * MIB]) == [True] * 4
    finish(two_hosts, ranks)


def broadcast_without_an_arena(connection, folder, rank):
    """The first rank of the second host loses its arena; answers what came, and what it was warned of."""
    join(folder, rank)
    for number, size in enumerate([MIB, 80 * MIB]):
        objects = [{"tensor": pattern(number, size), "empty": shmx.share(torch.empty(0))}] if rank == 0 else [None]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            distributed.broadcast_object_list(objects)
        right = is_pattern(objects[0]["tensor"], number)
        del objects
        dist.barrier()
        if rank == 2 and number == 0:
            for name in os.listdir("/dev/shm"):
                os.unlink(f"/dev/shm/{name}")
    connection.send([right, [str(one.message).count("SegmentLostError") for one in warned]])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.needs_names
def test_a_host_that_cannot_publish_passes_the_bytes_on_and_warns(children, two_hosts, tmp_path):
    ranks = start(children, two_hosts, tmp_path, broadcast_without_an_arena)
    answers = [rank.receive() for rank in ranks]
    assert answers == [[True, []], [True, []], [True, [1]], [True, []]]
    for rank in ranks:
        rank.result()


def send_lost(connection, folder, rank):
    """A handle whose data is gone, among others."""
    join(folder, rank)
    objects = [None] * 3
    if rank == 0:
        lost = shmx.share(pattern(1))
        lost.release()
        objects = [lost, pattern(2, MIB), "healthy"]
    distributed.broadcast_object_list(objects)
    connection.send([type(objects[0].error).__name__, is_pattern(objects[1], 2), objects[2]])
    dist.barrier()
    dist.destroy_process_group()


def test_a_handle_without_data_keeps_its_reason_on_other_hosts(children, two_hosts, tmp_path):
    ranks = start(children, two_hosts, tmp_path, send_lost)
    answers = [rank.receive() for rank in ranks]
    assert answers == [["ReleasedError", True, "healthy"]] * 4
    for rank in ranks:
        rank.result()


def load_foreign(connection, folder, rank):
    """Handles across hosts without a group."""
    path = folder / "blob"
    if rank == 0:
        handle = shmx.share(pattern(1))
        path.write_bytes(pickle.dumps(handle))
        connection.send("written")
        connection.recv()
        return
    connection.recv()
    connection.send(type(pickle.loads(path.read_bytes()).error).__name__)


@pytest.mark.needs_names
def test_a_handle_from_another_host_without_a_group_is_a_clear_error(children, two_hosts, tmp_path):
    here, there = (start_on(children, host, load_foreign, tmp_path, rank) for rank, host in enumerate(two_hosts.hosts))
    assert here.receive() == "written"
    there.send("load")
    assert there.receive() == "ForeignHostError"
    here.send("end")
    here.result()
    there.result()


def broadcast_until_broken(connection, folder, rank):
    # A rank that waits for one that has given up sees it only by the time.
    join(folder, rank, timeout=5)
    number = 0
    try:
        while True:
            objects = [pattern(number, MIB)] if rank == 0 else [None]
            distributed.broadcast_object_list(objects)
            assert is_pattern(objects[0], number)
            if number == 10:
                connection.send("under way")
            number += 1
    except RuntimeError:
        connection.send("broken")
    connection.recv()


@pytest.mark.parametrize("victim", [2, 3], ids=["first-of-its-host", "second-of-its-host"])
def test_a_killed_remote_rank_leaves_nothing(children, two_hosts, tmp_path, victim):
    ranks = start(children, two_hosts, tmp_path, broadcast_until_broken)
    assert [rank.receive() for rank in ranks] == ["under way"] * 4
    ranks[victim].kill()
    others = [rank for index, rank in enumerate(ranks) if index != victim]
    assert [rank.receive() for rank in others] == ["broken"] * 3
    for rank in others:
        rank.send("end")
    for rank in others:
        rank.result()
    assert two_hosts.names() == [set(), set()]
