"""Every dtype that has bytes crosses to another process bit by bit; the others are refused by name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch

import shmx
from shmx import _core
from tests.children import Children

STORED = (
    "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128", "bool",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
)  # fmt: skip
REFUSED = (
    *(f"int{bits}" for bits in range(1, 8)),
    *(f"uint{bits}" for bits in range(1, 8)),
    "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2",
    "qint8", "qint32", "quint8", "quint4x2", "quint2x4",
)  # fmt: skip

# torch says these once per process, of tensors that this file makes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]

Bits = dict[str, dict[str, bytes]]


def tensor_of(name: str) -> torch.Tensor:
    """A 6 x 4 tensor of random bits, NaN payloads and subnormals among them."""
    dtype = getattr(torch, name)
    generator = random.Random(name)
    count = 6 * 4 * dtype.itemsize
    raw = bytes(generator.randrange(2) for _ in range(count)) if name == "bool" else generator.randbytes(count)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(6, 4)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def read_bits(connection: Connection) -> Bits:
    found: Bits = {}
    for name, (contiguous, transposed, in_place) in connection.recv().items():
        into = torch.empty(4 * 6 * contiguous.dtype.itemsize, dtype=torch.uint8).view(contiguous.dtype).reshape(6, 4)
        found[name] = {
            "dtype": f"{contiguous.dtype} {contiguous.view().dtype} {contiguous.nbytes}".encode(),
            "view": bits_of(contiguous.view()),
            "materialize": bits_of(contiguous.materialize()),
            "materialize_into": bits_of(contiguous.materialize_into(into)),
            "transposed": bits_of(transposed.view()),
            "transposed in place": bits_of(in_place.materialize()),
        }
    return found


@pytest.fixture(scope="module")
def seen_by_a_spawned_process() -> Iterator[Bits]:
    """What one other process reads of a tensor of each dtype."""
    started = Children()
    try:
        handles = {}
        for name in STORED:
            source = tensor_of(name)
            in_arena = shmx.empty((6, 4), dtype=source.dtype)
            in_arena.copy_(source)
            handles[name] = (shmx.share(source), shmx.share(source.t()), shmx.share(in_arena.t()))
        child = started.start(read_bits)
        child.send(handles)
        yield child.result()
    finally:
        started.kill()
        _core.leave_all()


@pytest.mark.parametrize("name", STORED)
def test_a_stored_dtype_reaches_a_spawned_process_bit_by_bit(name, seen_by_a_spawned_process):
    source = tensor_of(name)
    whole, transposed = bits_of(source), bits_of(source.t())
    assert seen_by_a_spawned_process[name] == {
        "dtype": f"torch.{name} torch.{name} {len(whole)}".encode(),
        "view": whole,
        "materialize": whole,
        "materialize_into": whole,
        "transposed": transposed,
        "transposed in place": transposed,
    }


@pytest.mark.parametrize("name", REFUSED)
def test_a_dtype_without_a_byte_layout_is_a_type_error_that_lists_the_stored_ones(name):
    tensor = torch.empty(4, dtype=getattr(torch, name))
    for refuse in (
        lambda: shmx.share(tensor),
        lambda: shmx.share(tensor, key="k"),
        lambda: shmx.empty(4, dtype=tensor.dtype),
    ):
        with pytest.raises(TypeError) as caught:
            refuse()
        message = str(caught.value)
        assert f"torch.{name}" in message
        listed = message.split("it stores ")[1].split(" (")[0].split(", ")
        assert sorted(listed) == sorted(STORED)


def test_something_that_is_no_dtype_is_a_type_error():
    with pytest.raises(TypeError, match="cannot store dtype float32; it stores"):
        shmx.empty(4, dtype="float32")


def test_every_dtype_of_this_torch_is_either_stored_or_refused():
    installed = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert len(installed) > 40
    assert installed - {*STORED, *REFUSED} == set()
    assert not set(STORED) & set(REFUSED)
