"""`wrap`: what is published, how it is announced, and what happens when it cannot be."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import shmx
from shmx import arena as arena_module
from tests.blocks import block_of, messages
from tests.containers import Data
from tests.patterns import BLOCK, is_pattern, pattern, small_arena


def held(arena=None):
    return (arena or shmx.default_arena()).stats()["held_blocks"]


@pytest.fixture
def unwarned(monkeypatch):
    """As in a process that has not met a full arena yet."""
    monkeypatch.setattr(arena_module, "_inline_fallbacks", 0)


# ---- what is published


def test_small_tensors_stay_where_they_are():
    small, large = torch.zeros(10), pattern(1)
    request = shmx.wrap([small, large])
    assert request[0] is small
    assert isinstance(request[1], shmx.SharedTensor)


def test_min_bytes_is_the_least_that_is_published():
    tensor = torch.zeros(100, dtype=torch.uint8)
    assert shmx.wrap([tensor], min_bytes=101)[0] is tensor
    assert shmx.wrap([tensor], min_bytes=100)[0].nbytes == 100


def test_the_default_is_64_kib_or_what_the_environment_says():
    code = "import torch, shmx; print([shmx.has_shared(shmx.wrap([torch.zeros(n, dtype=torch.uint8)])) for n in %r])"
    for setting, sizes in ((None, (65535, 65536)), ("1KiB", (1023, 1024)), ("0", (0,))):
        environment = {name: value for name, value in os.environ.items() if name != "SHMX_MIN_BYTES"}
        done = subprocess.run(
            [sys.executable, "-c", code % (sizes,)],
            env=environment | ({"SHMX_MIN_BYTES": setting} if setting else {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stdout.strip() == str([size == sizes[-1] for size in sizes])


def test_a_tensor_by_itself_and_an_object_without_any():
    assert isinstance(shmx.wrap(pattern(1)), shmx.SharedTensor)
    for obj in (None, 5, "text", [], {"k": ()}, Data(1, 2)):
        assert shmx.wrap(obj) is obj
        assert not shmx.has_shared(obj)


def test_wrapping_twice_changes_nothing():
    request = shmx.wrap([pattern(1), {"k": (pattern(2),)}])
    first, second = request[0], request[1]["k"]
    published = shmx.stats()["arena"]["published"]
    assert shmx.wrap(request) is request
    assert request[0] is first
    assert request[1]["k"] is second
    assert shmx.stats()["arena"]["published"] == published


class Subclass(torch.Tensor):
    pass


def nested_tensor(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([tensor, tensor[:5]])


def unusual_tensors():
    tensor = torch.rand(200, 200)
    freed = tensor.clone()
    part = freed[50:]
    freed.untyped_storage().resize_(0)
    return {
        "requires grad": tensor.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(tensor),
        "subclass": tensor.as_subclass(Subclass),
        "sparse": tensor.to_sparse(),
        "nested": nested_tensor(tensor),
        "another device": torch.empty(200, 200, device="meta"),
        "one element, repeated": torch.zeros(1).expand(200, 200),
        "freed": freed,
        "part of what was freed": part,
        "array of objects": np.array([object()] * 20_000),
        "subclass of ndarray": np.ma.masked_array(np.zeros(20_000)),
    }


@pytest.mark.parametrize("name", unusual_tensors())
def test_what_a_handle_cannot_say_stays_where_it_is(name):
    tensor = unusual_tensors()[name]
    request = {"unusual": tensor, "usual": pattern(1)}
    shmx.wrap(request)
    assert request["unusual"] is tensor
    assert isinstance(request["usual"], shmx.SharedTensor)


def test_layouts_keep_their_values():
    base = torch.arange(60_000.0).reshape(200, 300)
    tensors = [base.t(), base[1:, ::2], base.to(torch.bfloat16), torch.complex(base, base).conj()]
    request = shmx.wrap(list(tensors), min_bytes=1000)
    for now, before in zip(shmx.unwrap(request), tensors, strict=True):
        assert torch.equal(now, before)
        assert now.dtype == before.dtype


# ---- arrays


def arrays():
    numbers = np.arange(60_000, dtype=np.int64).reshape(200, 300)
    readonly = numbers.copy()
    readonly.flags.writeable = False
    return {
        "numbers": numbers,
        "transposed": numbers.T,
        "backwards": numbers[::-1, ::-2],
        "read-only": readonly,
        "uint16": numbers.astype(np.uint16),
        "big-endian": numbers.astype(">i4"),
        "dates": numbers.astype("datetime64[s]"),
        "text": numbers.astype("U8"),
        "records": np.zeros(20_000, dtype=[("x", "f4"), ("y", "i2")]),
        "field of records": np.ones(20_000, dtype=[("x", "f4"), ("y", "u1")])["x"],
        "long double": numbers.astype(np.longdouble),
        "long long": numbers.astype(np.ulonglong),
    }


@pytest.mark.parametrize("name", arrays())
def test_arrays_come_back_as_arrays(name):
    array = arrays()[name]
    request = shmx.wrap({"array": array, "tensor": pattern(1)})
    shared = request["array"]
    assert isinstance(shared, shmx.SharedArray)
    assert (shared.shape, shared.dtype, shared.nbytes, len(shared)) == (
        array.shape,
        array.dtype,
        array.nbytes,
        len(array),
    )
    assert block_of(shared.tensor) == block_of(request["tensor"])
    with shmx.readers(1):
        blob = pickle.dumps(request)
    assert messages() == 1
    for one in (request, pickle.loads(blob)):
        assert np.array_equal(np.asarray(one["array"]), array)
        assert np.array_equal(one["array"].view(), array)
        unwrapped = shmx.unwrap(one)["array"]
        assert type(unwrapped) is np.ndarray
        assert unwrapped.dtype == array.dtype
        assert np.array_equal(unwrapped, array)
        unwrapped[0] = unwrapped[1]


def test_a_shared_array_is_asked_like_a_handle():
    shared = shmx.wrap(np.arange(20_000.0))
    assert shared.is_available
    assert shared.error is None
    assert repr(shared).startswith("SharedArray(shape (20000,) float64, SharedTensor(")
    assert np.array_equal(np.array(shared, dtype=np.int32, copy=True), np.arange(20_000))
    shared.release()
    assert not shared.is_available
    assert isinstance(shared.error, shmx.ReleasedError)
    scalar = shmx.wrap(np.array(5.0), min_bytes=0)
    with pytest.raises(TypeError, match="0-d"):
        len(scalar)


# ---- announcing


def read(connection, blob):
    request = shmx.unwrap(pickle.loads(blob))
    return is_pattern(request["a"], 1) and is_pattern(request["b"][0], 2)


def test_rule_2_readers_are_bound_to_the_object_as_one_message(children):
    request = shmx.wrap({"a": pattern(1), "b": (pattern(2),)}, readers=3)
    blob = pickle.dumps(request)
    assert messages() == 1
    del request
    assert held() == 0
    assert children.start(read, blob).result()
    for _ in range(2):
        assert messages() == 1
        assert read(None, blob)
    assert messages() == 0


@pytest.mark.parametrize("tensors", [1, 2])
def test_bound_readers_hold_for_one_tensor_and_for_bytes_too(tensors):
    request = shmx.wrap([pattern(seed) for seed in range(tensors)], readers=2)
    data = request[0].to_bytes()
    del request
    for _ in range(2):
        assert messages() == 1
        assert is_pattern(shmx.SharedTensor.from_bytes(data).view(), 0)
    assert messages() == 0


def test_impossible_readers_publish_nothing():
    published = shmx.default_arena().stats()["published"]
    for wrong in (-1, 5000):
        with pytest.raises(ValueError, match="readers must lie between"):
            shmx.wrap([pattern(1), pattern(2)], readers=wrong)
    assert shmx.stats()["arena"]["published"] == published


def test_an_arena_of_ones_own_is_used():
    with small_arena() as arena:
        request = shmx.wrap([pattern(1)], arena=arena)
        assert block_of(request[0])[0] == arena.name.removeprefix("/")
        request.clear()


# ---- a full arena


def test_a_full_arena_leaves_tensors_inline_counted_and_warned_of_once(unwarned):
    with small_arena(4) as arena:
        tensors = [pattern(seed, BLOCK) for seed in range(6)]
        request = {"all": list(tensors), "array": np.arange(20_000)}
        with pytest.warns(RuntimeWarning, match="arena is full") as warned:
            assert shmx.wrap(request, arena=arena) is request
        assert len(warned) == 1
        assert "test_wrap.py" in warned[0].filename
        assert all(now is before for now, before in zip(request["all"], tensors, strict=True))
        assert not shmx.has_shared(request)
        assert shmx.stats()["inline_fallbacks"] == 7
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shmx.wrap([pattern(1, 5 * BLOCK)], arena=arena)
        assert shmx.stats()["inline_fallbacks"] == 8
        assert "\nshmx_inline_fallbacks_total 8\n" in shmx.metrics_text()
        assert held(arena) == 0
        # What fits goes on being published.
        assert shmx.has_shared(shmx.wrap([tensors[0]], arena=arena))


# ---- giving it back


def test_a_discarded_object_holds_nothing():
    request = shmx.wrap([Data(pattern(1), (pattern(2),)), np.arange(20_000)])
    assert held() == 1
    assert shmx.discard(request) == 3
    assert held() == 0
    with pytest.raises(shmx.ReleasedError):
        shmx.unwrap(request)
    assert shmx.discard(request) == 3
    assert shmx.discard({"nothing": 1}) == 0


def test_a_discarded_pickle_leaves_no_message():
    with shmx.readers(4):
        blob = pickle.dumps(shmx.wrap([Data(pattern(1), (pattern(2),))]))
    assert messages() == 1
    for data in (bytearray(blob), memoryview(blob)):
        shmx.discard(data)
    assert messages() == 0


def test_a_collected_object_holds_nothing():
    request = shmx.wrap({"a": pattern(1)})
    request["self"] = request
    assert held() == 1
    del request["a"]
    assert held() == 0


# ---- whether there is anything to unwrap


def test_has_shared_tells_wherever_it_is():
    handle = shmx.share(pattern(1))
    for obj in (handle, [handle], {"k": ({handle},)}, Data(None, Data(1, handle)), shmx.wrap(np.arange(20_000))):
        assert shmx.has_shared(obj)
    for obj in (None, [pattern(1)], {handle: 1}, Data(1, "text")):
        assert not shmx.has_shared(obj)
