"""msgpack messages of msgspec: tensors and handles in them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

import shmx
from tests.blocks import messages
from tests.patterns import is_pattern, pattern, press, small_arena

encoder = msgspec.msgpack.Encoder(enc_hook=shmx.enc_hook)


class Request(msgspec.Struct):
    rid: str
    features: Any
    grid: torch.Tensor
    mask: np.ndarray | None = None
    handle: shmx.SharedTensor | None = None


decoder = msgspec.msgpack.Decoder(Request, dec_hook=shmx.dec_hook, ext_hook=shmx.ext_hook)


def encode(obj, readers=1):
    with shmx.readers(readers):
        return encoder.encode(obj)


def load(connection, data):
    request = shmx.unwrap(decoder.decode(data))
    return request.rid == "r" and all(is_pattern(tensor, seed) for seed, tensor in enumerate(request.features))


def test_large_tensors_leave_as_handles_and_small_ones_inline(children):
    data = encode(Request("r", [pattern(0), pattern(1)], torch.tensor([[1, 4, 6]])), readers=2)
    assert len(data) < 500
    assert messages() == 2
    assert shmx.stats()["arena"]["held_blocks"] == 0
    assert children.start(load, data).result()
    assert load(None, data)
    assert messages() == 0


def test_a_wrapped_request_is_encoded_as_it_is_however_many_tensors_share_its_block():
    features = [pattern(seed) for seed in range(25)]
    data = encode(shmx.wrap(Request("r", features, torch.zeros(2))), readers=2)
    for _ in range(2):
        assert load(None, data)
    assert messages() == 0


def test_rule_2_a_second_message_of_a_block_that_has_all_it_can_have_is_announced_too():
    with small_arena(40) as arena:
        wrapped = shmx.wrap(Request("r", [pattern(seed) for seed in range(12)], torch.zeros(2)), arena=arena)
        first, second = encode(wrapped), encode(wrapped)
        del wrapped
        assert load(None, first)
        press(arena)
        assert load(None, second)


def test_fields_of_tensors_get_the_callers_own():
    mask = np.arange(20_000, dtype=np.int16)
    request = Request("r", None, pattern(1), mask, shmx.share(pattern(2)))
    for one in (decoder, msgspec.msgpack.Decoder(Request, dec_hook=shmx.dec_hook)):
        decoded = one.decode(encode(request))
        assert is_pattern(decoded.grid, 1)
        assert np.array_equal(decoded.mask, mask)
        assert is_pattern(decoded.handle.view(), 2)
        decoded.mask[0] = decoded.grid[0] = 5


class Grid(msgspec.Struct):
    array: npt.NDArray[np.float32]


@pytest.mark.parametrize("elements", [4, 20_000], ids=["small", "large"])
def test_a_field_may_name_the_dtype_of_its_array(elements):
    array = np.ones(elements, np.float32)
    decoded = msgspec.msgpack.decode(encode(Grid(array)), type=Grid, dec_hook=shmx.dec_hook)
    assert np.array_equal(decoded.array, array)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(2.5),
        torch.zeros(0, 3, dtype=torch.int16),
        torch.rand(4, 6).bfloat16().t(),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        np.arange(6).reshape(2, 3).T,
        np.array(["a", "bc"]),
        np.zeros((0, 2)),
        np.arange(20_000).astype("datetime64[s]"),
        np.arange(20_000).astype(">f4"),
    ],
    ids=lambda value: f"{type(value).__name__} {value.dtype} {tuple(value.shape)}",
)
def test_values_come_back_whatever_their_type(value):
    decoded = shmx.unwrap(msgspec.msgpack.decode(encode({"v": [value]}), ext_hook=shmx.ext_hook))["v"][0]
    assert type(decoded) is type(value)
    assert decoded.dtype == value.dtype
    assert decoded.shape == value.shape
    assert (torch.equal if isinstance(value, torch.Tensor) else np.array_equal)(decoded, value)


def test_rule_5_decoding_a_handle_never_raises_because_data_is_gone():
    handle = shmx.share(pattern(1))
    data = encode({"h": handle, "typed": 1}, readers=0)
    typed = encode(Request("r", None, handle), readers=0)
    handle.revoke()
    lost = msgspec.msgpack.decode(data, ext_hook=shmx.ext_hook)["h"]
    assert isinstance(lost.error, shmx.StaleHandleError)
    with pytest.raises((shmx.StaleHandleError, msgspec.ValidationError)):
        decoder.decode(typed)


def test_what_cannot_be_encoded_is_named():
    records = np.zeros(20_000, dtype=[("x", "f4"), ("y", "i2")])
    others = (object(), torch.eye(3).to_sparse(), torch.zeros(3, requires_grad=True), np.array([object()]))
    for value in (*others, records, shmx.wrap(records)):
        with pytest.raises(NotImplementedError, match="shmx encodes"):
            encode([value])
    with pytest.raises(NotImplementedError, match="shmx decodes"):
        shmx.dec_hook(dict, shmx.share(pattern(1)))


def test_damaged_and_hostile_data_is_refused():
    nothing = ([], 5, [0], [7, b"x", "f4", [1]])
    no_handles = ([0, b"x"], [1, b"x", "f4"], [1, b"x", "f4", [1]])
    no_tensors = ([0, b"abcd", "float32", [2]], [0, b"abcd", "load", [1]])
    no_arrays = ([1, b"abcdabcd", "O", [1], True], [1, b"abc", "f4", [1], True])
    for content in (*nothing, *no_handles, *no_tensors, *no_arrays):
        with pytest.raises(shmx.InvalidHandleError):
            shmx.ext_hook(83, msgspec.msgpack.encode(content))
    with pytest.raises(shmx.InvalidHandleError):
        shmx.ext_hook(83, b"\xc1")
    with pytest.raises(shmx.InvalidHandleError, match="no dtype 'load'"):
        shmx.ext_hook(83, msgspec.msgpack.encode([0, b"abcd", "load", [1]]))


def test_other_extensions_pass():
    ext = msgspec.msgpack.Ext(5, b"data")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode([ext]), ext_hook=shmx.ext_hook)[0] == ext
