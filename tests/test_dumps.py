"""`dumps` and `loads`: large tensors leave as handles from any graph that pickle takes."""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
import warnings
from multiprocessing.connection import Pipe

import numpy as np
import pytest
import torch

import shmx
from shmx import arena as arena_module
from tests.blocks import block_of, messages
from tests.containers import KINDS, Data, Plain
from tests.patterns import BLOCK, is_pattern, pattern, small_arena

loaders = pytest.mark.parametrize("loads", [shmx.loads, pickle.loads], ids=["shmx.loads", "pickle.loads"])


def held(arena=None):
    return (arena or shmx.default_arena()).stats()["held_blocks"]


class ByReduce:
    """Hides its tensor from any walk."""

    def __init__(self, tensor):
        self.give = lambda: tensor

    def __reduce__(self):
        return ByReduce, (self.give(),)


class Subclass(torch.Tensor):
    pass


# ---- what leaves, what stays


@loaders
def test_any_graph_comes_back_and_its_tensors_travel_as_handles(loads):
    graph = {name: kind.make(pattern(1), pattern(2)) for name, kind in KINDS.items() if "unset" not in name}
    del graph["subclass of dict"]
    graph["hidden"] = ByReduce(pattern(3))
    graph["exception"] = ValueError(pattern(4))
    blob = shmx.dumps(graph, readers=1)
    assert len(blob) < 10_000
    assert messages() == 1
    assert held() == 0
    loaded = loads(blob)
    assert messages() == 0
    assert held() == 0
    assert is_pattern(loaded["hidden"].give(), 3)
    assert is_pattern(loaded["exception"].args[0], 4)
    for name in graph.keys() - {"hidden", "exception"}:
        assert {int(tensor[0]) for tensor in KINDS[name].read(loaded[name])} == {int(pattern(1)[0]), int(pattern(2)[0])}


def test_the_object_is_not_changed():
    tensor = pattern(1)
    graph = [tensor]
    shmx.dumps(graph, readers=0)
    assert graph[0] is tensor
    assert is_pattern(tensor, 1)


@pytest.mark.parametrize("obj", [None, 5, "text", [1, (2,)], Data(1, 2), torch.arange(3), np.arange(3)])
def test_without_large_tensors_it_is_a_pickle_like_any_other(obj):
    blob = shmx.dumps(obj)
    assert b"shmx.pickling\x94\x8c\x08_restore" not in blob
    assert str(pickle.loads(blob)) == str(obj)
    assert str(shmx.loads(pickle.dumps(obj))) == str(obj)
    assert shmx.stats()["arena"] is None


def test_min_bytes_is_of_memory():
    base = torch.zeros(1000, dtype=torch.uint8)
    assert len(shmx.dumps(base, min_bytes=1001, readers=0)) > 1000
    assert len(shmx.dumps(base, min_bytes=1000, readers=0)) < 1000


class Lengths:
    """A file that keeps nothing, so that there is one copy less of what is written."""

    def __init__(self):
        self.written = 0

    def write(self, data):
        self.written += len(data)


def test_memory_of_any_size_travels_in_the_pickle():
    tensor = torch.empty((2 << 30) + 4096, dtype=torch.uint8)
    shmx.Pickler(file := Lengths(), min_bytes=1 << 40).dump(tensor)
    assert tensor.nbytes < file.written < tensor.nbytes + 1000


@loaders
def test_what_torch_knows_of_a_tensor_is_kept(loads):
    leaf = torch.rand(200, 200, requires_grad=True)
    marked = torch.rand(200, 200)
    marked.note = "mine"
    graph = {
        "grad": leaf,
        "parameter": torch.nn.Parameter(torch.rand(200, 200)),
        "module": torch.nn.Linear(200, 200),
        "subclass": torch.rand(200, 200).as_subclass(Subclass),
        "conj": torch.rand(200, 200, dtype=torch.complex64).conj(),
        "bfloat16": torch.rand(200, 200).bfloat16(),
        "marked": marked,
        "sparse": torch.rand(200, 200).relu().to_sparse(),
        "storage": torch.rand(20_000).untyped_storage(),
        "meta": torch.empty(200, 200, device="meta"),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(2.5),
    }
    loaded = loads(shmx.dumps(graph, min_bytes=1000))
    assert loaded["grad"].requires_grad
    assert type(loaded["parameter"]) is torch.nn.Parameter
    assert type(loaded["subclass"]) is Subclass
    assert loaded["conj"].is_conj()
    assert loaded["marked"].note == "mine"
    assert loaded["meta"].is_meta
    assert torch.equal(loaded["module"].weight, graph["module"].weight)
    assert torch.equal(loaded["sparse"].to_dense(), graph["sparse"].to_dense())
    assert bytes(loaded["storage"]) == bytes(graph["storage"])
    for name in ("grad", "parameter", "conj", "bfloat16", "marked", "empty", "scalar"):
        assert torch.equal(loaded[name], graph[name])
        assert loaded[name].dtype == graph[name].dtype


# ---- memory that is shared


@loaders
@pytest.mark.parametrize("elements", [20_000, 10], ids=["large", "small"])
@pytest.mark.parametrize("part_first", [True, False])
def test_tensors_over_the_same_memory_share_it_again(loads, elements, part_first):
    base = torch.arange(float(elements))
    parts = [base, base[2:6], base.view(2, -1).t(), base.view(torch.int32)]
    loaded = loads(shmx.dumps(parts[::-1] if part_first else parts))
    whole, part, turned, integers = loaded[::-1] if part_first else loaded
    assert turned.stride() == parts[2].stride()
    assert integers.dtype == torch.int32
    whole[3] = -5
    assert part[1] == -5
    assert turned.t().reshape(-1)[3] == -5
    assert integers[3] == torch.tensor(-5.0).view(torch.int32)


def test_memory_of_several_tensors_is_published_once():
    base = torch.zeros(1 << 20, dtype=torch.uint8)
    with shmx.Arena(capacity=3 << 20) as arena:
        blob = shmx.dumps([base, base[5:], base.view(4, -1), {"again": base}], arena=arena)
        assert arena.stats()["bytes_in_use"] < 2 << 20
        loaded = shmx.loads(blob)
        assert loaded[3]["again"] is loaded[0]
        assert arena.stats()["messages"] == 0


def test_one_object_in_several_places_stays_one():
    tensor, array = pattern(1), np.arange(20_000)
    graph = [tensor, {"again": tensor}, array, (array,)]
    graph.append(graph)
    loaded = shmx.loads(shmx.dumps(graph))
    assert loaded[0] is loaded[1]["again"]
    assert loaded[2] is loaded[3][0]
    assert loaded[4] is loaded


def test_a_tensor_that_lives_in_the_arena_is_not_copied():
    placed = shmx.empty((20_000,), dtype=torch.int32)
    placed.fill_(7)
    blob = shmx.dumps([placed, placed[3:]])
    handle = shmx.loads(blob, lazy=True)[0]
    assert handle.view().data_ptr() == placed.data_ptr()


# ---- arrays and other buffers


@loaders
def test_arrays_come_back_as_arrays(loads):
    numbers = np.arange(60_000, dtype=np.int64).reshape(200, 300)
    arrays = {
        "numbers": numbers,
        "fortran": np.asfortranarray(numbers),
        "strided": numbers[::2, ::-3],
        "dates": numbers.astype("datetime64[s]"),
        "records": np.zeros(20_000, dtype=[("x", "f4"), ("y", "i2")]),
        "masked": np.ma.masked_array(numbers, numbers % 2),
        "objects": np.array([None] * 20_000),
        "small": np.arange(3),
    }
    loaded = loads(shmx.dumps(arrays))
    for name, array in arrays.items():
        assert type(loaded[name]) is type(array)
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array)
    assert loaded["fortran"].flags.f_contiguous
    assert loaded["numbers"].flags.writeable


class Buffered:
    """Pickles its bytes by protocol 5, as data frames do."""

    def __init__(self, data):
        self.data = memoryview(data)

    def __reduce_ex__(self, protocol):
        return Buffered, (pickle.PickleBuffer(self.data),)


@loaders
@pytest.mark.parametrize("data", [bytes(range(256)) * 1000, bytearray(range(256)) * 1000, b"few"], ids=len)
def test_buffers_of_protocol_5_leave_as_handles(loads, data):
    blob = shmx.dumps([Buffered(data), pattern(1)])
    assert len(blob) < 1000
    buffered, tensor = loads(blob)
    assert bytes(buffered.data) == data
    assert buffered.data.readonly == isinstance(data, bytes)
    assert is_pattern(tensor, 1)


# ---- handles that are in the object


@loaders
def test_handles_stay_handles_and_travel_beside_the_tensors(loads):
    handles = shmx.share_many([pattern(1), pattern(2)])
    blob = shmx.dumps([handles, pattern(3), handles[0], shmx.wrap(np.arange(20_000))], readers=1)
    blocks = {block_of(handle) for handle in handles}
    del handles
    assert messages() == 3
    (first, second), tensor, again, array = loads(blob)
    assert messages() == 0
    assert first is again
    assert {block_of(first), block_of(second)} == blocks
    assert is_pattern(second.view(), 2)
    assert is_pattern(tensor, 3)
    assert isinstance(array, shmx.SharedArray)


def test_a_lost_handle_of_the_object_is_no_reason_to_raise():
    handle = shmx.share(pattern(1))
    handle.release()
    tensor, lost = shmx.loads(shmx.dumps([pattern(2), handle]))
    assert is_pattern(tensor, 2)
    assert isinstance(lost.error, shmx.ReleasedError)


# ---- announcing, and taking back


def sums(connection, blob, with_pickle):
    graph = (pickle.loads if with_pickle else shmx.loads)(blob)
    return is_pattern(graph["a"], 1) and np.array_equal(graph["b"].first, np.arange(20_000))


def test_rule_2_announced_loads_succeed_in_any_process(children):
    blob = shmx.dumps({"a": pattern(1), "b": Data(np.arange(20_000), None)}, readers=3)
    assert messages() == 1
    assert held() == 0
    assert children.start(sums, blob, True).result()
    assert children.start(sums, blob, False).result()
    assert messages() == 1
    assert sums(None, blob, True)
    assert messages() == 0


def test_readers_around_it_announce_too():
    with shmx.readers(2):
        blob = shmx.dumps([pattern(1), pattern(2)])
    for left in (1, 0):
        shmx.loads(blob)
        assert messages() == left
    with pytest.raises(RuntimeError, match="not sent"), shmx.readers(2):
        shmx.dumps([pattern(1)])
        raise RuntimeError("not sent")
    assert messages() == 0


@pytest.mark.parametrize("others", [[], [pattern(2)]], ids=["handles only", "handles and tensors"])
def test_readers_are_those_of_the_handles_in_the_object_too(others):
    blob = shmx.dumps([shmx.share(pattern(1)), *others], readers=2)
    for left in (1, 0):
        assert is_pattern(shmx.loads(blob)[0].view(), 1)
        assert messages() == left * (1 + len(others))


def test_readers_that_are_bound_to_a_handle_go_first():
    blob = shmx.dumps([shmx.share(pattern(1)).with_readers(1), shmx.share(pattern(2))], readers=2)
    for left in (1, 0):
        shmx.loads(blob)
        assert messages() == left


def test_a_discarded_pickle_leaves_no_message():
    blob = shmx.dumps([pattern(1), shmx.share(pattern(2)), Data(np.arange(20_000), 1)], readers=5)
    assert messages() == 2
    assert shmx.discard(blob) == 2
    assert messages() == 0


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("no")


def test_what_cannot_be_pickled_leaves_nothing_published():
    shmx.default_arena()
    for bad in (Unpicklable(), lambda: 0):
        with pytest.raises((RuntimeError, AttributeError, pickle.PicklingError)):
            shmx.dumps([pattern(1), bad])
    deep = []
    for _ in range(20 * sys.getrecursionlimit()):
        deep = [deep]
    with pytest.raises(RecursionError):
        shmx.dumps([pattern(1), deep])
    while deep:
        deep = deep.pop()
    assert shmx.stats()["arena"]["published"] == 0


class FullDisk:
    def write(self, data):
        raise OSError("no space")


def test_a_file_that_does_not_take_it_leaves_no_message():
    with pytest.raises(OSError, match="no space"):
        shmx.Pickler(FullDisk(), readers=3).dump([pattern(1)])
    assert messages() == 0
    assert held() == 0


def test_a_full_arena_pickles_inline(monkeypatch):
    monkeypatch.setattr(arena_module, "_inline_fallbacks", 0)
    with small_arena(2) as arena:
        graph = [pattern(seed, BLOCK) for seed in range(4)] + [np.arange(20_000)]
        with pytest.warns(RuntimeWarning, match="arena is full"):
            blob = shmx.dumps(graph, arena=arena)
        assert len(blob) > 4 * BLOCK
        assert shmx.stats()["inline_fallbacks"] == 5
        for seed, tensor in enumerate(pickle.loads(blob)[:4]):
            assert is_pattern(tensor, seed)
        assert arena.stats()["published"] == 0


# ---- data that is gone


def lost():
    with small_arena() as arena:
        return shmx.dumps(
            {"t": pattern(1), "a": np.arange(1000), "part": pattern(2)[5:]}, arena=arena, min_bytes=1000, readers=0
        )


def test_loads_raises_the_reason():
    with pytest.raises(shmx.ShmxError, match="shmx-"):
        shmx.loads(lost())


@pytest.mark.parametrize("loads", [pickle.loads, lambda blob: shmx.loads(blob, lazy=True)], ids=["pickle", "lazy"])
def test_rule_5_otherwise_the_handles_with_the_reason_stay(loads):
    loaded = loads(lost())
    assert isinstance(loaded["t"], shmx.SharedTensor)
    assert isinstance(loaded["a"], shmx.SharedArray)
    assert not any(one.is_available for one in loaded.values())
    _, (error,) = shmx.unwrap(loaded, on_error="return")
    assert isinstance(error, shmx.ShmxError)
    with pytest.raises(shmx.ShmxError):
        torch.add(loaded["t"], 1)


def test_lazy_leaves_handles_to_be_unwrapped():
    blob = shmx.dumps({"t": pattern(1), "a": np.arange(20_000), "l": [pattern(2)]})
    loaded = shmx.loads(blob, lazy=True)
    assert isinstance(loaded["t"], shmx.SharedTensor)
    assert isinstance(loaded["a"], shmx.SharedArray)
    assert held() == 1
    loaded = shmx.unwrap(loaded)
    assert is_pattern(loaded["t"], 1)
    assert is_pattern(loaded["l"][0], 2)
    assert held() == 0


def test_lazy_copies_parameters():
    linear, tensor = torch.nn.Linear(200, 200), pattern(1)
    loaded, weight, lazy = shmx.loads(shmx.dumps([linear, linear.weight, tensor]), lazy=True)
    assert torch.equal(loaded.weight, linear.weight)
    assert loaded.weight is weight
    assert type(weight) is torch.nn.Parameter
    assert isinstance(lazy, shmx.SharedTensor)


def test_device_is_where_the_tensors_go():
    assert shmx.loads(shmx.dumps([pattern(1)]), device="cpu")[0].device.type == "cpu"
    with pytest.raises(Exception, match=r"hpu|HPU|device|backend"):
        shmx.loads(shmx.dumps([pattern(1)]), device="hpu")
    assert held() == 0


# ---- Pickler and Unpickler


def test_a_pickler_writes_one_message_after_another():
    file = io.BytesIO()
    pickler = shmx.Pickler(file, readers=1)
    tensor = pattern(1)
    for _ in range(3):
        pickler.dump([tensor, "text"])
    assert messages() == 3
    file.seek(0)
    unpickler = shmx.Unpickler(file)
    assert is_pattern(unpickler.load()[0], 1)
    assert is_pattern(pickle.load(file)[0], 1)
    assert is_pattern(shmx.Unpickler(file).load()[0], 1)
    assert messages() == 0


class OwnPickler(shmx.Pickler):
    def reducer_override(self, obj):
        return (str, ("replaced",)) if isinstance(obj, Plain) else NotImplemented

    def persistent_id(self, obj):
        return "sys" if obj is sys else None


class OwnUnpickler(shmx.Unpickler):
    def find_class(self, module, name):
        if name == "Data":
            raise pickle.UnpicklingError("no Data")
        return super().find_class(module, name)

    def persistent_load(self, pid):
        return sys


def test_subclasses_have_their_say_inside():
    def written(obj):
        OwnPickler(file := io.BytesIO()).dump(obj)
        file.seek(0)
        return file

    tensor, text, module = OwnUnpickler(written([pattern(1), Plain(1, 2), sys])).load()
    assert is_pattern(tensor, 1)
    assert text == "replaced"
    assert module is sys
    with pytest.raises(pickle.UnpicklingError, match="no Data"):
        OwnUnpickler(written([pattern(1), Data(1, 2)])).load()


class Registered:
    pass


def test_reducers_that_a_program_has_registered_are_used():
    copyreg.pickle(Registered, lambda obj: (str, ("registered",)))
    try:
        assert shmx.loads(shmx.dumps([Registered(), pattern(1)]))[0] == "registered"
    finally:
        del copyreg.dispatch_table[Registered]


def test_it_goes_through_a_pipe():
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        writer.send_bytes(shmx.dumps([pattern(1)], readers=1))
        assert is_pattern(shmx.loads(memoryview(reader.recv_bytes()))[0], 1)


def test_damaged_pickles_are_refused_like_any_other():
    blob = shmx.dumps([pattern(1), "x" * 100])
    for end in range(0, len(blob), 7):
        with pytest.raises(
            (pickle.UnpicklingError, EOFError, shmx.InvalidHandleError, IndexError, ValueError, TypeError)
        ):
            shmx.loads(blob[:end])
    shmx.discard(blob)


@pytest.mark.parametrize("capacity", [1 << 20, 64 << 20], ids=["inline", "in shared memory"])
def test_the_default_device_does_not_matter(capacity):
    whole = torch.arange(1 << 18)
    with shmx.Arena(capacity=capacity) as arena, torch.device("meta"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            blob = shmx.dumps([whole, whole[3:]], arena=arena)
        back = shmx.loads(blob)
        assert torch.equal(back[0], whole)
        assert torch.equal(back[1], whole[3:])
