"""The handle format, written a second time from its description in csrc/DESIGN.md."""

from __future__ import annotations

import base64
import dataclasses
import struct
import zlib

MAGIC = b"SX\x01"
HAS_MESSAGE, HAS_STRIDES, HAS_REASON, HAS_PLACE = 1, 2, 4, 8
DTYPES = (
    "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128", "bool",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
)  # fmt: skip


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def sealed(body: bytes) -> bytes:
    """``body`` with its checksum."""
    return body + struct.pack("<I", zlib.crc32(body))


def as_text(state: bytes) -> str:
    return base64.b64encode(state).rstrip(b"=").decode()


@dataclasses.dataclass
class HandleFields:
    host: int = 0
    arena: int = 0
    place: tuple[int, int] | None = None  # pid, descriptor
    block: int = 0
    generation: int = 0
    message: tuple[int, int] | None = None  # cell, tag
    offset: int = 0
    dtype: int = DTYPES.index("uint8")
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    reason: int = 0
    flags: int | None = None  # instead of what the fields ask for

    @property
    def arena_name(self) -> str:
        return f"shmx-{self.arena:016x}"

    def body(self) -> bytes:
        flags = HAS_MESSAGE * (self.message is not None)
        flags |= HAS_STRIDES * bool(self.strides) | HAS_REASON * bool(self.reason)
        flags |= HAS_PLACE * (self.place is not None)
        body = MAGIC + bytes([flags if self.flags is None else self.flags])
        body += struct.pack("<IQ", self.host, self.arena)
        for number in (*(self.place or ()), self.block, self.generation):
            body += varint(number)
        if self.message is not None:
            body += bytes([self.message[0]]) + varint(self.message[1])
        body += varint(self.offset) + bytes([self.dtype, len(self.shape)])
        for number in (*self.shape, *self.strides):
            body += varint(number)
        return body + (bytes([self.reason]) if self.reason else b"")

    def to_bytes(self) -> bytes:
        return sealed(self.body())


def parse(state: bytes) -> HandleFields:
    body, checksum = state[:-4], struct.unpack("<I", state[-4:])[0]
    assert body[:3] == MAGIC
    assert checksum == zlib.crc32(body)
    position = 4 + 12

    def byte() -> int:
        nonlocal position
        position += 1
        return body[position - 1]

    def number() -> int:
        value = shift = 0
        while True:
            part = byte()
            value |= (part & 0x7F) << shift
            shift += 7
            if part < 0x80:
                return value

    flags = body[3]
    host, arena = struct.unpack("<IQ", body[4:16])
    place = (number(), number()) if flags & HAS_PLACE else None
    fields = HandleFields(host, arena, place, block=number(), generation=number())
    if flags & HAS_MESSAGE:
        fields.message = (byte(), number())
    fields.offset, fields.dtype, dimensions = number(), byte(), byte()
    fields.shape = tuple(number() for _ in range(dimensions))
    if flags & HAS_STRIDES:
        fields.strides = tuple(number() for _ in range(dimensions))
    if flags & HAS_REASON:
        fields.reason = byte()
    assert position == len(body)
    return fields
