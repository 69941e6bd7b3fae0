"""The bytes of a handle are as written down, and nothing else is believed."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import shmx
from shmx import _core
from tests.blocks import block_of, generation_of, messages
from tests.handle_bytes import DTYPES, MAGIC, HandleFields, as_text, parse, sealed, varint
from tests.peer import control_file

SHM = Path("/dev/shm")
HEADER_BYTES = 64 * 1024
CONTROL_BYTES = HEADER_BYTES + (1 << 17) * 128
BLOCK_ENTRY = struct.Struct("<96xQQIHH8x")  # state, then offset, bytes, last use, segment, flags; padded to 128


def unannounced(handle: shmx.SharedTensor) -> bytes:
    with shmx.readers(0):
        return handle.to_bytes()


def load(fields: HandleFields) -> shmx.SharedTensor:
    return shmx.SharedTensor.from_bytes(fields.to_bytes())


# ---- what is written


def test_the_bytes_of_a_handle_are_as_described():
    handle = shmx.share(torch.zeros(3, 500, dtype=torch.bfloat16))
    state = handle.to_bytes()
    fields = parse(state)
    assert (fields.arena_name, fields.block) == block_of(handle)
    assert fields.generation == generation_of(handle)
    assert fields.message is not None
    assert DTYPES[fields.dtype] == "bfloat16"
    assert (fields.offset, fields.shape, fields.strides, fields.reason) == (0, (3, 500), (), 0)
    assert fields.to_bytes() == state
    assert shmx.discard(state) == 1


def test_a_slice_is_written_with_offset_and_strides():
    whole = shmx.empty((6, 40), dtype=torch.int32)
    state = unannounced(shmx.share(whole[1:, ::3].t()))
    fields = parse(state)
    assert (fields.offset, fields.shape, fields.strides) == (160, (14, 5), (3, 40))
    assert fields.message is None
    assert fields.to_bytes() == state


def test_a_message_is_written_with_its_cell_and_tag():
    handle = shmx.share(torch.zeros(3))
    first, second = parse(handle.to_bytes()), parse(handle.to_bytes())
    assert first.message is not None
    assert first.message != second.message
    assert dataclasses.replace(first, message=None) == parse(unannounced(handle))
    load(first)
    third = parse(handle.to_bytes())
    assert third.message is not None
    # The same cell again, another tag: the first message, loaded once more, takes nothing from the third.
    assert third.message[0] == first.message[0]
    assert third.message[1] != first.message[1]
    load(first)
    assert messages() == 2
    load(second)
    load(third)
    assert messages() == 0


def test_a_reason_is_written_instead_of_a_message():
    handle = shmx.share(torch.zeros(3))
    handle.release()
    fields = parse(handle.to_bytes())
    assert (fields.message, fields.reason) == (None, 5)


@pytest.mark.parametrize("number", range(len(DTYPES)))
def test_the_number_of_a_dtype_never_changes(number):
    dtype = getattr(torch, DTYPES[number])
    assert parse(unannounced(shmx.share(shmx.empty(2, dtype=dtype)))).dtype == number


def test_a_pickle_carries_the_same_bytes_as_ascii():
    handle = shmx.share(torch.zeros(3))
    with shmx.readers(0):
        reduced = handle.__reduce_ex__(4)
    assert reduced == (shmx.SharedTensor, (as_text(unannounced(handle)),))
    assert reduced[1][0].startswith(_core.TEXT_PREFIX)
    assert shmx.SharedTensor.__module__ == "shmx"


def test_bytes_and_pickle_lead_to_the_same_tensor():
    handle = shmx.share(torch.arange(5))
    assert torch.equal(shmx.SharedTensor.from_bytes(handle.to_bytes()).view(), torch.arange(5))
    assert torch.equal(shmx.SharedTensor(as_text(handle.to_bytes())).view(), torch.arange(5))
    assert messages() == 0


def test_the_largest_fields_pickle_within_256_bytes():
    limit = 1 << 48
    fields = HandleFields(
        host=(1 << 32) - 1, arena=(1 << 64) - 1, block=(1 << 17) - 1, generation=(1 << 64) - 2,
        offset=limit, shape=(1,) * 7 + (limit >> 1,), strides=(limit,) * 7 + (1,), reason=3,
    )  # fmt: skip
    fields.offset = 0
    handle = load(fields)
    assert parse(handle.to_bytes()) == fields
    # A message takes 4 bytes more than a reason.
    assert max(len(pickle.dumps(handle, protocol)) for protocol in range(2, 6)) <= 256 - 6


# ---- what is refused


def damaged(**changes: object) -> HandleFields:
    return dataclasses.replace(HandleFields(shape=(4, 4)), **changes)


REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "only the magic": MAGIC,
    "another magic": sealed(b"XS" + damaged().body()[2:]),
    "another version": sealed(b"SX\x02" + damaged().body()[3:]),
    "checksum": damaged().body() + b"\0\0\0\0",
    "unknown flags": damaged(flags=16).to_bytes(),
    "a place without a process": damaged(place=(0, 5)).to_bytes(),
    "a process beyond all": damaged(place=((1 << 22) + 1, 5)).to_bytes(),
    "a descriptor beyond all": damaged(place=(1, (1 << 30) + 1)).to_bytes(),
    "a place that is not there": damaged(flags=8, block=0).to_bytes(),
    "too short": sealed(damaged().body()[:-1]),
    "bytes left over": sealed(damaged().body() + b"\0"),
    "a message that is not there": damaged(flags=1).to_bytes(),
    "strides that are not there": damaged(flags=2).to_bytes(),
    "a reason that is not there": damaged(flags=4).to_bytes(),
    "block": damaged(block=1 << 17).to_bytes(),
    "odd generation": damaged(generation=3).to_bytes(),
    "cell": damaged(message=(10, 1)).to_bytes(),
    "tag": damaged(message=(0, 1 << 20)).to_bytes(),
    "offset": damaged(offset=(1 << 48) + 1).to_bytes(),
    "dtype": damaged(dtype=len(DTYPES)).to_bytes(),
    "dtype 255": damaged(dtype=255).to_bytes(),
    "65 dimensions": damaged(shape=(1,) * 65).to_bytes(),
    "size": damaged(shape=((1 << 48) + 1,)).to_bytes(),
    "a product that overflows 64 bits": damaged(shape=(1 << 32, 1 << 32)).to_bytes(),
    "a product that wraps to 0": damaged(shape=(1 << 32, 1 << 32, 1)).to_bytes(),
    "a product that wraps to something small": damaged(shape=(3, 0x5555555556, 1 << 26)).to_bytes(),
    "bytes": damaged(dtype=DTYPES.index("complex128"), shape=(1 << 47,)).to_bytes(),
    "stride": damaged(strides=(1, (1 << 48) + 1)).to_bytes(),
    "strides that overflow 64 bits": damaged(strides=(1 << 48, 1 << 48), shape=(1 << 24, 1 << 24)).to_bytes(),
    "strides that add up": damaged(strides=(1 << 47, 1 << 47), shape=(2, 3)).to_bytes(),
    "strides of a scalar": damaged(flags=2, shape=()).to_bytes(),
    "reason 0": sealed(damaged(flags=4).body() + b"\0"),
    "reason 10": damaged(reason=10).to_bytes(),
    "a number of 10 bytes": sealed(damaged().body()[:16] + b"\xff" * 9 + b"\x02" + damaged().body()[17:]),
    "a number without end": sealed(damaged().body()[:16] + b"\xff" * 40),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bytes_that_break_a_rule_of_the_format_are_an_invalid_handle(name):
    state = REFUSED[name]
    for read in (
        lambda: shmx.SharedTensor.from_bytes(state),
        lambda: shmx.SharedTensor(as_text(state)),
        lambda: pickle.loads(pickle.dumps(Pickled(as_text(state)))),
        lambda: shmx.discard(MAGIC + state[3:] if name == "nothing" else state),
    ):
        with pytest.raises(shmx.InvalidHandleError):
            read()


class Pickled:
    """Pickles as a handle with any text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[object, ...]:
        return (shmx.SharedTensor, (self.text,))


def test_the_rules_that_refuse_let_the_unchanged_fields_pass():
    assert load(damaged()).shape == (4, 4)
    assert load(damaged(block=(1 << 17) - 1, message=(9, (1 << 20) - 1), strides=(0, 1))).shape == (4, 4)


@pytest.mark.parametrize(
    "text", ["...", "", "U", "U1gB", "U1gB=", "U1gB\n", "U1gB\0\0\0", "U1gBé", "A" * 100, "-_" * 20]
)
def test_a_text_that_is_no_handle_is_an_invalid_handle(text):
    with pytest.raises(shmx.InvalidHandleError, match="not a valid shmx handle"):
        shmx.SharedTensor(text)


def test_a_text_with_bits_left_over_is_an_invalid_handle():
    state = next(s for s in (HandleFields(shape=(size,)).to_bytes() for size in (1, 1000, 100_000)) if len(s) % 3)
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    text = as_text(state)
    # The last digit of a text whose length is no multiple of 4 has spare bits, which are 0.
    altered = text[:-1] + digits[digits.index(text[-1]) + 1]
    assert shmx.SharedTensor(text).shape
    with pytest.raises(shmx.InvalidHandleError, match="bits left over"):
        shmx.SharedTensor(altered)


@pytest.mark.parametrize("argument", [None, 5, ["U1gB"], object()])
def test_an_argument_that_is_no_text_is_a_type_error(argument):
    with pytest.raises(TypeError):
        shmx.SharedTensor(argument)
    with pytest.raises(TypeError):
        shmx.SharedTensor.from_bytes(argument)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_from_bytes_takes_what_a_socket_gives(kind):
    handle = shmx.share(torch.arange(3))
    assert torch.equal(shmx.SharedTensor.from_bytes(kind(unannounced(handle))).view(), torch.arange(3))


# ---- what the bytes say is checked against the arena


def test_a_tensor_larger_than_its_block_is_an_invalid_handle():
    handle = shmx.share(torch.zeros(256, dtype=torch.uint8))
    good = parse(unannounced(handle))
    assert load(dataclasses.replace(good, shape=(1,), offset=255)).is_available
    assert load(dataclasses.replace(good, shape=(256,), strides=(0,), offset=255)).is_available
    for change in (
        {"shape": (257,)},
        {"offset": 1},
        {"shape": (1,), "offset": 256},
        {"shape": (33,), "dtype": DTYPES.index("int64")},
        {"shape": (2,), "strides": (256,)},
        {"shape": (1 << 40,)},
        {"shape": (), "offset": 1 << 47},
    ):
        with pytest.raises(shmx.InvalidHandleError, match="larger than what block 0"):
            load(dataclasses.replace(good, **change))
    assert shmx.stats()["arena"]["held_blocks"] == 1
    handle.release()
    gc.collect()
    assert shmx.stats()["arena"]["held_blocks"] == 0


def carried(fields: HandleFields) -> Exception:
    """The reason that a handle with these fields carries."""
    handle = load(fields)
    assert not handle.is_available
    error = handle.error
    assert error is not None
    with pytest.raises(type(error)) as raised:
        handle.view()
    assert str(raised.value) == str(error)
    assert shmx.discard(fields.to_bytes()) == 0
    return error


def test_a_block_that_the_arena_does_not_have_is_carried():
    good = parse(unannounced(shmx.share(torch.zeros(4))))
    error = carried(dataclasses.replace(good, block=(1 << 17) - 1))
    assert isinstance(error, shmx.InvalidHandleError)
    assert good.arena_name in str(error)


@pytest.mark.parametrize("generation", [2, 1 << 20, (1 << 64) - 2])
def test_another_generation_is_carried_as_stale(generation):
    handle = shmx.share(torch.zeros(4))
    error = carried(dataclasses.replace(parse(unannounced(handle)), generation=generation))
    assert isinstance(error, shmx.StaleHandleError)
    assert handle.is_available


def test_an_arena_that_does_not_exist_is_carried_as_lost():
    good = parse(unannounced(shmx.share(torch.zeros(4))))
    missing = dataclasses.replace(good, arena=good.arena ^ 1)
    error = carried(missing)
    assert type(error) is shmx.SegmentLostError
    assert missing.arena_name in str(error)
    with pytest.raises(shmx.SegmentLostError):
        shmx.attach(load(missing))


def test_another_host_is_carried_as_foreign():
    handle = shmx.share(torch.zeros(4))
    good = parse(handle.to_bytes())
    error = carried(dataclasses.replace(good, host=good.host ^ 1))
    assert type(error) is shmx.ForeignHostError
    assert "--ipc=host" in str(error)
    assert messages() == 1  # neither its load nor its discard has touched the message of this host
    load(good)
    again = pickle.loads(pickle.dumps(load(dataclasses.replace(good, host=good.host ^ 1))))
    assert type(again.error) is shmx.ForeignHostError


REASONS = {
    2: shmx.SegmentLostError, 3: shmx.StaleHandleError, 4: shmx.ForeignHostError, 5: shmx.ReleasedError,
    6: shmx.InvalidHandleError, 7: shmx.TooManyPeersError, 9: shmx.SystemCallError,
}  # fmt: skip


@pytest.mark.parametrize("reason", range(1, 10))
def test_every_reason_that_decodes_is_carried_as_an_error_of_shmx(reason):
    good = parse(unannounced(shmx.share(torch.zeros(4))))
    try:
        error = carried(dataclasses.replace(good, reason=reason))
    except shmx.InvalidHandleError:
        assert reason not in REASONS
        return
    assert isinstance(error, shmx.ShmxError)
    assert type(error) is REASONS.get(reason, type(error))
    assert good.arena_name in str(error)


# ---- hostile control segments


@pytest.fixture
def fake_control() -> Iterator[Callable[[bytes, int], HandleFields]]:
    """Put a control segment of a new name into /dev/shm: (content, size) -> fields of a handle that names it."""
    made: list[Path] = []

    def make(content: bytes, size: int) -> HandleFields:
        host = parse(unannounced(shmx.share(torch.zeros(4)))).host
        fields = HandleFields(host=host, arena=random.SystemRandom().getrandbits(64), shape=(4,))
        made.append(SHM / fields.arena_name)
        made[-1].write_bytes(content)
        os.truncate(made[-1], size)
        return fields

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def header_of(arena: shmx.Arena) -> bytes:
    with open(SHM / arena.name.removeprefix("/"), "rb") as control:
        return control.read(HEADER_BYTES)


@pytest.mark.needs_names
def test_the_control_segment_is_laid_out_as_these_tests_think():
    arena = shmx.default_arena()
    assert (SHM / arena.name.removeprefix("/")).stat().st_size == CONTROL_BYTES
    assert BLOCK_ENTRY.size == 128
    magic, version, header_bytes, arena_id = struct.unpack("<8sIIQ", header_of(arena)[:24])
    assert magic == b"shmxctl1"
    assert version == _core.LAYOUT_VERSION
    assert header_bytes == HEADER_BYTES
    assert f"/shmx-{arena_id:016x}" == arena.name


@pytest.mark.needs_names
def test_a_control_segment_of_another_layout_version_is_carried_and_names_both(fake_control):
    header = header_of(shmx.default_arena())
    other = _core.LAYOUT_VERSION + 41
    fields = fake_control(header[:8] + struct.pack("<I", other) + header[12:], CONTROL_BYTES)
    error = load(fields).error
    assert isinstance(error, shmx.InvalidHandleError)
    assert f"layout version {other}, this shmx reads {_core.LAYOUT_VERSION};" in str(error)
    assert fields.arena_name in str(error)
    assert shmx.stats()["attached"] == [shmx.default_arena().name]
    report = {entry["name"]: entry["outcome"] for entry in shmx.gc(force=True)}
    assert report["/" + fields.arena_name] == "not ours"


@pytest.mark.needs_names
def test_a_control_segment_of_another_arena_is_carried(fake_control):
    fields = fake_control(header_of(shmx.default_arena()), CONTROL_BYTES)
    error = load(fields).error
    assert isinstance(error, shmx.InvalidHandleError)
    assert "is damaged" in str(error)


@pytest.mark.parametrize("size", [0, 7, 8, 100, HEADER_BYTES - 1])
@pytest.mark.needs_names
def test_a_control_segment_without_a_whole_header_is_carried_as_lost(fake_control, size):
    fields = fake_control(header_of(shmx.default_arena())[:size], size)
    error = load(fields).error
    assert type(error) is shmx.SegmentLostError
    assert fields.arena_name in str(error)


@pytest.mark.parametrize("size", [HEADER_BYTES, HEADER_BYTES + 4096, CONTROL_BYTES - 1, CONTROL_BYTES + 1])
@pytest.mark.needs_names
def test_a_control_segment_of_another_size_is_carried(fake_control, size):
    error = load(fake_control(header_of(shmx.default_arena()), size)).error
    assert isinstance(error, (shmx.InvalidHandleError, shmx.SegmentLostError))


@pytest.mark.needs_names
def test_a_truncated_control_segment_is_not_told_as_another_version(fake_control):
    error = load(fake_control(header_of(shmx.default_arena()), CONTROL_BYTES - 4096)).error
    assert "layout version" not in str(error)


@pytest.mark.needs_names
def test_a_control_segment_without_magic_is_carried_as_lost(fake_control):
    error = load(fake_control(bytes(HEADER_BYTES), CONTROL_BYTES)).error
    assert type(error) is shmx.SegmentLostError
    assert "interrupted" in str(error)


@pytest.mark.needs_names
def test_a_file_that_is_no_control_segment_is_carried(fake_control):
    error = load(fake_control(random.Random(1).randbytes(HEADER_BYTES), CONTROL_BYTES)).error
    assert isinstance(error, shmx.InvalidHandleError)


@pytest.mark.parametrize("kind", ["directory", "symbolic link", "pipe"])
@pytest.mark.needs_names
def test_a_name_that_is_no_file_is_carried(kind):
    host = parse(unannounced(shmx.share(torch.zeros(4)))).host
    fields = HandleFields(host=host, arena=random.SystemRandom().getrandbits(64), shape=(4,))
    path = SHM / fields.arena_name
    target = SHM / shmx.default_arena().name.removeprefix("/")
    {"directory": path.mkdir, "symbolic link": lambda: path.symlink_to(target), "pipe": lambda: os.mkfifo(path)}[kind]()
    try:
        assert isinstance(load(fields).error, shmx.ShmxError)
        assert shmx.stats()["attached"] == [shmx.default_arena().name]
    finally:
        path.rmdir() if kind == "directory" else path.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.needs_names
def test_an_arena_of_another_user_is_carried(fake_control):
    fields = fake_control(header_of(shmx.default_arena()), CONTROL_BYTES)
    os.chown(SHM / fields.arena_name, 12345, -1)
    error = load(fields).error
    assert isinstance(error, shmx.InvalidHandleError)
    assert "user id 12345" in str(error)


def errors_of_views(connection: Connection) -> list[tuple[str, str]]:
    found = []
    for state in connection.recv():
        handle = shmx.SharedTensor.from_bytes(state)
        try:
            handle.view()
            found.append(("none", ""))
        except shmx.ShmxError as error:
            found.append((type(error).__name__, str(error)))
    return found


@pytest.mark.needs_names
def test_data_segments_that_a_third_party_removed_or_cut_are_an_error_of_the_view(children):
    arenas = [shmx.Arena(capacity=1 << 22) for _ in range(3)]
    handles = [arena.share(torch.zeros(1 << 20, dtype=torch.uint8)) for arena in arenas]
    paths = [SHM / (arena.name.removeprefix("/") + ".1") for arena in arenas]
    paths[0].unlink()
    os.truncate(paths[1], 4096)
    child = children.start(errors_of_views)
    child.send([unannounced(handle) for handle in handles])
    (removed, removed_text), (cut, cut_text), whole = child.result()
    assert (removed, cut) == ("SegmentLostError", "SegmentLostError")
    assert paths[0].name in removed_text
    assert "lost its name" in removed_text
    assert paths[1].name in cut_text
    assert "truncated" in cut_text
    assert whole == ("none", "")


# ---- whatever bytes come


def mapped_segments(arena_name: str) -> list[tuple[int, int, str]]:
    """Start, end and file name of what this process has mapped of an arena's data."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        parts = line.split()
        name = Path(parts[5]).name if len(parts) > 5 else ""
        if name == f"memfd:{arena_name}" and (offset := int(parts[2], 16)):
            # Segments of 2 MiB behind a control segment of 18.
            name = f"{arena_name}.{(offset >> 21) - 8}"
        if name.startswith(arena_name + "."):
            start, end = (int(address, 16) for address in parts[0].split("-"))
            found.append((start, end, name))
    return found


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and one past the last address of the elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def mutated(generator: random.Random, good: list[bytes]) -> bytes:
    """A good state, spoilt in some way; half of the time with a checksum that is right again."""
    state = bytearray(generator.choice(good))
    reseal = generator.random() < 0.5
    if reseal:
        del state[-4:]
    kind = generator.randrange(8)
    if kind == 0:
        for _ in range(generator.choice((1, 1, 2, 8))):
            state[generator.randrange(len(state))] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del state[generator.randrange(len(state)) :]
    elif kind == 2:
        state += generator.randbytes(generator.randrange(1, 20))
    elif kind == 3:
        other = generator.choice(good)
        cut = generator.randrange(len(state))
        state[cut:] = other[generator.randrange(len(other)) :]
    elif kind == 4:
        state[3:] = generator.randbytes(generator.randrange(80))
    elif kind == 5:
        # Numbers on the edges, where the numbers are.
        at = generator.randrange(16, max(len(state), 17))
        edge = generator.choice((0, 1, 127, 128, 255, 1 << 17, 1 << 32, 1 << 48, (1 << 63) - 1, (1 << 64) - 1))
        state[at : at + 1] = varint(edge)
    elif kind == 6:
        at = generator.randrange(4, len(state))
        del state[at : at + generator.randrange(1, 4)]
    else:
        state[generator.randrange(3, len(state))] = generator.randrange(256)
    return sealed(bytes(state)) if reseal else bytes(state)


def mutated_fields(generator: random.Random, good: list[bytes]) -> bytes:
    """A well-formed state with wrong facts: these pass the checksum and most of the format's rules."""
    fields = parse(generator.choice(good))
    for _ in range(generator.randrange(1, 4)):
        match generator.randrange(10):
            case 0:
                fields.block = generator.choice((0, 1, 2, 3, 5, 8, 200, 255, 256, 1000))
            case 1:
                fields.generation = 2 * generator.choice((0, 0, 0, 1, 2, 1 << 30))
            case 2:
                fields.message = (generator.randrange(11), generator.randrange(8))
            case 3:
                fields.offset = generator.choice((0, 1, 3, 64, 255, 256, 4096, 1 << 20, 1 << 40))
            case 4:
                fields.dtype = generator.randrange(23)
            case 5:
                fields.shape = tuple(generator.choice((0, 1, 2, 3, 16, 300, 1 << 20, 1 << 33)) for _ in range(3))
                fields.strides = ()
            case 6:
                fields.strides = tuple(generator.choice((0, 1, 4, 90, 1 << 20, 1 << 47)) for _ in fields.shape)
            case 7:
                fields.reason = generator.randrange(11)
            case 8:
                fields.place = generator.choice((None, (1, 0), (os.getpid(), 0), (1 << 22, 1 << 30), (0, 1)))
            case _:
                fields.arena ^= generator.choice((0, 1, 1 << 63))
    return fields.to_bytes()


def test_a_shape_without_elements_is_taken_as_torch_takes_it():
    """Its other sizes may be large, as long as torch can multiply them."""
    with shmx.share(torch.zeros(4, dtype=torch.uint8)) as handle:
        fields = parse(handle.to_bytes(readers=0))
        refused = 0
        for shape in itertools.product((0, 1, 3, 1 << 31, 1 << 32, 1 << 47, 1 << 62, (1 << 63) - 1), repeat=3):
            if 0 not in shape:
                continue
            fields.shape = shape
            try:
                torch.empty(shape, dtype=torch.uint8)
            except RuntimeError:
                refused += 1
                with pytest.raises(shmx.InvalidHandleError):
                    shmx.SharedTensor.from_bytes(fields.to_bytes())
            else:
                assert shmx.SharedTensor.from_bytes(fields.to_bytes()).view().shape == shape
        assert refused > 10


def load_mutations(connection: Connection, seed: int, count: int) -> dict[str, int]:
    good: list[bytes] = connection.recv()
    held = [shmx.SharedTensor.from_bytes(state) for state in good]
    views = [handle.view() for handle in held if handle.is_available]
    arena_name = block_of(held[0])[0]
    attached = shmx.stats()["attached"]
    segments = mapped_segments(arena_name)
    names = set(os.listdir("/dev/shm"))
    descriptors = len(os.listdir("/proc/self/fd"))
    outcomes = {"invalid": 0, "error of the view": 0, "view": 0}
    with open(control_file(f"/{arena_name}"), "rb") as control:
        control.seek(HEADER_BYTES)
        table = [BLOCK_ENTRY.unpack(control.read(128)) for _ in range(256)]

    def check(state: bytes) -> str:
        try:
            handle = shmx.SharedTensor(as_text(state)) if len(state) & 1 else shmx.SharedTensor.from_bytes(state)
        except shmx.InvalidHandleError:
            return "invalid"
        repr(handle)
        assert handle.nbytes >= 0
        try:
            view = handle.view()
        except shmx.ShmxError:
            assert not handle.is_available
            with pytest.raises(shmx.ShmxError):
                handle.materialize()
            return "error of the view"
        if view.numel():
            start, end = extent(view)
            _, block = block_of(handle)
            offset, size, _, segment, _ = table[block]
            base = next(low for low, _, name in segments if name.endswith(f".{segment + 1}"))
            assert base + offset <= start < end <= base + offset + size, repr(handle)
            for corner in ((0,) * view.ndim, (-1,) * view.ndim):
                view[corner].reshape(1).view(torch.uint8).tolist()
        return "view"

    generator = random.Random(seed)
    for number in range(count):
        make = mutated_fields if number % 3 == 0 else mutated
        state = make(generator, good)
        try:
            outcomes[check(state)] += 1
        except BaseException as error:
            raise AssertionError(f"mutation {number} of seed {seed}: {state.hex()}") from error
    assert shmx.stats()["attached"] == attached
    assert set(os.listdir("/dev/shm")) <= names
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert mapped_segments(arena_name) == segments
    for handle, view in zip(held, views, strict=False):
        assert torch.equal(handle.materialize(), view)
    return outcomes


def test_10000_mutated_states_crash_nothing_leak_nothing_and_read_nothing_outside_their_block(children):
    arena = shmx.Arena(capacity=1 << 23, segment_bytes=1 << 21)
    first = arena.share(torch.arange(1000, dtype=torch.int32))
    second = arena.share(torch.arange(60.0).reshape(3, 4, 5))
    whole = arena.empty((40, 30), dtype=torch.float32)
    whole.copy_(torch.arange(1200.0).reshape(40, 30))
    part = arena.share(whole[3:9, ::2].t())
    scalar, none = arena.share(torch.tensor(7, dtype=torch.uint8)), arena.share(torch.empty(0, 3))
    released = arena.share(torch.zeros(5))
    released.release()
    held = [first, second, part, scalar, none]
    with shmx.readers(1):
        announced = [handle.to_bytes() for handle in (first, part)]
    good = [*(unannounced(handle) for handle in held), *announced, unannounced(released)]
    child = children.start(load_mutations, 20240611, 10_000)
    child.send(good)
    outcomes = child.result()
    # Each kind of outcome was met, and often.
    assert min(outcomes.values()) > 300
    assert sum(outcomes.values()) == 10_000
    assert torch.equal(first.view(), torch.arange(1000, dtype=torch.int32))
    assert torch.equal(whole, torch.arange(1200.0).reshape(40, 30))
    arena.sweep()
    assert arena.stats()["holders"] == 1
    assert arena.stats()["held_blocks"] == len(held)
    assert messages(arena) == 0


# ---- readers of the bytes


def test_bytes_announce_as_many_loads_as_they_are_told():
    handle = shmx.share(torch.arange(5)).with_readers(7)
    with shmx.readers(9):
        data = handle.to_bytes(readers=2)
    handle.release()
    for _ in range(2):
        assert messages() == 1
        assert torch.equal(shmx.SharedTensor.from_bytes(data).view(), torch.arange(5))
    assert messages() == 0


def test_bytes_with_readers_are_taken_back_by_discard_alone():
    handle = shmx.share(torch.arange(5))
    with pytest.raises(KeyError), shmx.readers(1):
        told, untold = handle.to_bytes(readers=3), handle.to_bytes()
        raise KeyError
    assert messages() == 1
    assert shmx.discard(untold) == 0
    assert shmx.discard(told) == 1
    assert messages() == 0


@pytest.mark.parametrize("readers", [-1, 4096, 2**70])
def test_bytes_for_an_impossible_number_of_readers_are_refused(readers):
    with pytest.raises(ValueError, match="between 0 and 4095"):
        shmx.share(torch.arange(5)).to_bytes(readers=readers)
    assert messages() == 0
