"""The main claim, over real sockets and process groups: one publication, any number of ranks, no barrier, no loss.

A producer sends requests over ZMQ to the first rank of a gloo group, which broadcasts each one pickled (the size, then
the bytes) and goes on with the object that it has itself. Every rank keeps a backlog of decoded requests and takes
their tensors out in random order, after random work. Nothing waits for anything else.
"""

from __future__ import annotations

import datetime
import pickle
import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shmx
from tests.children import BOUND
from tests.patterns import is_pattern, pattern

zmq = pytest.importorskip("zmq")

BACKLOG = 8
SIZES = [256, 4096, 64 << 10, 128 << 10, 256 << 10]


def room(ranks: int) -> int:
    """Capacity for the largest backlog of every rank, half as much again for pieces that do not fit: with less, all
    could wait for the producer while it waits for them."""
    return ranks * BACKLOG * max(SIZES) * 3 // 2


def encode(request: Any, readers: int) -> bytes:
    with shmx.readers(readers):
        return pickle.dumps(request)


# ---- processes ----


def produce(connection, addresses, requests, sends, readers, settings, stays=False):
    """Publish and send; end as soon as the last byte is under way. Every message goes to every address."""
    torch.set_num_threads(1)
    shmx.configure(**settings)
    choose = random.Random(requests)
    context = zmq.Context()
    sockets = [context.socket(zmq.PUSH) for _ in addresses]
    for socket, address in zip(sockets, addresses, strict=True):
        socket.connect(address)
    for number in range(requests):
        tensor = pattern(number, choose.choice(SIZES))
        request = {"number": number, "pixels": [shmx.share(tensor, timeout=BOUND)]}
        for _ in range(sends):
            blob = encode(request, readers)
            for socket in sockets:
                socket.send(blob)
    for socket in sockets:
        socket.send(b"")
        socket.close(linger=-1)
    context.term()
    if stays:
        connection.send("sent")
        connection.recv()


def route(connection, source, target):
    """Decode and encode again without taking the tensors: a load balancer."""
    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.bind(source)
    push.connect(target)
    while blob := pull.recv():
        push.send(encode(pickle.loads(blob), 1))
    push.send(b"")
    for socket in (pull, push):
        socket.close(linger=-1)
    context.term()


def broadcast_bytes(blob: bytes | None) -> bytes:
    """The size, then the bytes, from rank 0 to the others; they are what is returned everywhere."""
    size = torch.tensor([0 if blob is None else len(blob)])
    dist.broadcast(size, src=0)
    if size.item() == 0:
        return b""
    if blob is None:
        content = torch.empty(int(size.item()), dtype=torch.uint8)
    else:
        content = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    dist.broadcast(content, src=0)
    return content.numpy().tobytes()


class Rank:
    """What a rank does with its requests: everything at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.backlog: list[dict[str, Any]] = []
        self.outcome: Counter[str] = Counter()

    def put(self, request: dict[str, Any]) -> None:
        self.backlog.append(request)
        while len(self.backlog) > self.random.randrange(BACKLOG + 1):
            self.take()

    def take(self) -> None:
        request = self.backlog.pop(self.random.randrange(len(self.backlog)))
        for _ in range(self.random.randrange(40)):
            zlib.crc32(bytes(32 << 10))
        (handle,) = request["pixels"]
        try:
            tensor = handle.view() if self.random.random() < 0.5 else handle.materialize()
        except shmx.ShmxError as error:
            self.outcome[type(error).__name__] += 1
            return
        self.outcome["right" if is_pattern(tensor, request["number"]) else "wrong"] += 1

    def finish(self) -> dict[str, int]:
        while self.backlog:
            self.take()
        return dict(self.outcome)


def join_group(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=BOUND)
    )


def serve_decoded(connection, rank, world, store, address, readers):
    """Rank 0 decodes, encodes for the others and keeps its own object, as inference engines do."""
    join_group(rank, world, store)
    mine = Rank(rank)
    if rank == 0:
        context = zmq.Context()
        pull = context.socket(zmq.PULL)
        pull.bind(address)
        connection.recv()
        while blob := pull.recv():
            request = pickle.loads(blob)
            broadcast_bytes(encode(request, readers))
            mine.put(request)
        broadcast_bytes(None)
        pull.close()
        context.term()
    else:
        while blob := broadcast_bytes(None):
            mine.put(pickle.loads(blob))
    connection.send(mine.finish())
    connection.recv()  # gloo breaks the connections of the others when a rank ends
    dist.destroy_process_group()


def serve_raw(connection, rank, world, store, address):
    """Rank 0 passes on what it got, byte for byte: one message that every rank of every group loads."""
    join_group(rank, world, store)
    mine = Rank(rank)
    context = zmq.Context()
    pull = context.socket(zmq.PULL)
    if rank == 0:
        pull.bind(address)
    while True:
        blob = broadcast_bytes((pull.recv() or None) if rank == 0 else None)
        if not blob:
            break
        mine.put(pickle.loads(blob))
    pull.close()
    context.term()
    connection.send(mine.finish())
    connection.recv()
    dist.destroy_process_group()


# ---- the driver ----


def outcomes(ranks) -> list[dict[str, int]]:
    found = [rank.receive() for rank in ranks]
    for rank in ranks:
        rank.send(None)
    for rank in ranks:
        rank.result()
    return found


def broadcast(
    children,
    folder: Path,
    *,
    world: int,
    requests: int,
    sends: int = 1,
    announced: bool = True,
    router: bool = False,
    late: bool = False,
    method: str = "fork",
    **settings: Any,
) -> list[dict[str, int]]:
    """Run one producer and one group; what each rank found.

    The producer of unannounced messages stays until all is done. ``late``: nothing is loaded before all is sent.
    """
    entry = target = f"ipc://{folder}/rank0"
    extra = []
    if router:
        entry = f"ipc://{folder}/router"
        extra.append(children.start(route, entry, target, method=method))
    arguments = (world, f"{folder}/store", target, world - 1 if announced else 0)
    ranks = [children.start(serve_decoded, rank, *arguments, method=method) for rank in range(world)]
    producer = children.start(produce, [entry], requests, sends, int(announced), settings, not announced, method=method)
    if late:
        producer.receive()
    ranks[0].send("go on")
    found = outcomes(ranks)
    if not announced:
        if not late:
            producer.receive()
        producer.send("go home")
    for child in [*extra, producer]:
        child.result()
    return found


@pytest.mark.needs_names
def test_four_ranks_lose_nothing(children, tmp_path, segments):
    """Rules 1, 2 and 7, with processes that share nothing but sockets. Twice the arena goes through it."""
    found = broadcast(children, tmp_path, world=4, requests=300, method="spawn", capacity=room(4))
    print(f"300 messages, 4 ranks: {found}")
    assert found == [{"right": 300}] * 4
    assert not segments()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.needs_names
def test_four_ranks_lose_nothing_of_two_thousand_messages(children, tmp_path, segments):
    """Rules 1, 2 and 7."""
    found = broadcast(children, tmp_path, world=4, requests=2000, method="spawn", capacity=room(4))
    print(f"2000 messages, 4 ranks: {found}")
    assert found == [{"right": 2000}] * 4
    assert not segments()


@pytest.mark.needs_names
def test_eight_ranks_lose_nothing(children, tmp_path, segments):
    """Rules 1, 2 and 7."""
    found = broadcast(children, tmp_path, world=8, requests=200, capacity=room(8))
    assert found == [{"right": 200}] * 8
    assert not segments()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.needs_names
def test_eight_ranks_lose_nothing_of_two_thousand_messages(children, tmp_path, segments):
    """Rules 1, 2 and 7."""
    found = broadcast(children, tmp_path, world=8, requests=2000, capacity=room(8))
    print(f"2000 messages, 8 ranks: {found}")
    assert found == [{"right": 2000}] * 8
    assert not segments()


@pytest.mark.needs_names
def test_one_handle_sent_three_times_is_three_messages(children, tmp_path, segments):
    """Rule 2: n > 1 sampling; every message is broadcast to all ranks."""
    found = broadcast(children, tmp_path, world=3, requests=40, sends=3, capacity=room(3))
    assert found == [{"right": 120}] * 3
    assert not segments()


@pytest.mark.needs_names
def test_a_router_that_decodes_and_encodes_loses_nothing(children, tmp_path, segments):
    """Rules 2 and 4: it takes one load and announces another, and never touches the bytes."""
    found = broadcast(children, tmp_path, world=3, requests=100, router=True, capacity=room(3))
    assert found == [{"right": 100}] * 3
    assert not segments()


@pytest.mark.needs_names
def test_two_groups_load_one_pickle(children, tmp_path, segments):
    """Rule 2: readers is the sum over all groups; the groups run at their own pace."""
    folders = [tmp_path / name for name in ("first", "second")]
    addresses = [f"ipc://{tmp_path}/{folder.name}.zmq" for folder in folders]
    ranks = [
        children.start(serve_raw, rank, 2, folder, address, method="fork")
        for folder, address in zip(folders, addresses, strict=True)
        for rank in range(2)
    ]
    producer = children.start(produce, addresses, 60, 1, 4, {"capacity": room(4)}, method="fork")
    assert outcomes(ranks) == [{"right": 60}] * 4
    producer.result()
    assert not segments()


def test_an_unannounced_broadcast_loses_nothing_while_there_is_room(children, tmp_path, segments):
    """Rule 3: the capacity exceeds the traffic, and the producer stays until all is loaded."""
    found = broadcast(children, tmp_path, world=3, requests=100, announced=False, capacity=64 << 20)
    assert found == [{"right": 100}] * 3
    assert not segments()


def test_an_unannounced_broadcast_without_room_is_stale_and_never_wrong(children, tmp_path, segments):
    """Rule 3: whatever was reused says so; nothing is loaded before all is sent, so most of it was."""
    found = broadcast(children, tmp_path, world=3, requests=60, announced=False, late=True, capacity=1 << 20)
    assert not segments()
    for outcome in found:
        assert sum(outcome.values()) == 60
        assert set(outcome) <= {"right", "StaleHandleError"}
        assert outcome["StaleHandleError"] >= 20
