"""What the benchmarks move: messages of float32 tensors, their names, and whether they arrived unchanged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = ["MM32", "Payload", "Reference", "Sources", "parse"]

MM32 = "mm32"
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SOURCES = 3
_STAMPS = 64


@dataclass(frozen=True)
class Payload:
    """One message: the bytes of each of its tensors."""

    name: str
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes)


def parse(text: str) -> Payload:
    """Return the payload of a name: ``4KiB``, ``8x24MiB`` (8 tensors), or ``mm32``.

    Raises
    ------
    ValueError
        It is none of these, or not a multiple of 4 bytes.
    """
    if text == MM32:
        return Payload(MM32, _image_sizes())
    match = re.fullmatch(r"(?:(\d+)x)?(\d+) ?(B|KiB|MiB|GiB)", text)
    size = int(match[2]) * _UNITS[match[3]] if match else 0
    count = int(match[1] or 1) if match else 0
    if not size or size % 4 or not count:
        raise ValueError(f"{text!r} is not a size: write 4KiB, 16MiB, 8x24MiB, or {MM32}")
    return Payload(text, (size,) * count)


def _image_sizes() -> tuple[int, ...]:
    """Bytes of the pixel_values of the 32 images of the demonstration."""
    from . import images

    patches = images.CHANNELS * images.TEMPORAL_PATCH * images.PATCH**2
    resized = (images.smart_resize(height, width) for width, height in images.SIZES)
    return tuple(height * width // images.PATCH**2 * patches * 4 for height, width in resized)


def _content(size: int, index: int) -> torch.Tensor:
    # Knuth's multiplicative hash: neighbours differ in all bytes, and so do the tensors of one message.
    return torch.arange(size // 4, dtype=torch.int32).add_(index << 20).mul_(-1640531535)


def _places(elements: int) -> torch.Tensor:
    """First, last, and evenly between."""
    return torch.linspace(0, elements - 1, min(_STAMPS, elements), dtype=torch.float64).to(torch.int64)


def _stamps(serial: int, index: int, count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32).add_(_stamp(serial, index))


def _stamp(serial: int, index: int) -> int:
    return serial * 100_003 % 1_000_000_007 + index * 1_009


class Sources:
    """Messages to send, in several buffers that take turns, so that a source is not always in the cache."""

    def __init__(self, payload: Payload, buffers: int = _SOURCES) -> None:
        content = [_content(size, index) for index, size in enumerate(payload.sizes)]
        self._sets = [content, *([tensor.clone() for tensor in content] for _ in range(buffers - 1))]
        self._places = [_places(len(tensor)) for tensor in content]

    def stamped(self, serial: int) -> list[torch.Tensor]:
        """The tensors of message `serial`: no two serials have the same bytes."""
        chosen = self._sets[serial % len(self._sets)]
        for index, (tensor, places) in enumerate(zip(chosen, self._places, strict=True)):
            tensor[places] = _stamps(serial, index, len(places))
        return [tensor.view(torch.float32) for tensor in chosen]


class Reference:
    """What a consumer compares with."""

    def __init__(self, payload: Payload) -> None:
        self._content = [_content(size, index) for index, size in enumerate(payload.sizes)]
        self._places = [_places(len(tensor)) for tensor in self._content]

    def fault(self, tensors: Sequence[torch.Tensor], serial: int, *, everything: bool) -> str | None:
        """Say what is wrong with message `serial`, or return None.

        Parameters
        ----------
        everything
            Compare every byte; otherwise the stamps alone, which lie from the first element to the last.
        """
        if len(tensors) != len(self._content):
            return f"{len(tensors)} tensors instead of {len(self._content)}"
        return next(self._faults(tensors, serial, everything), None)

    def check_ends(self, tensors: Sequence[torch.Tensor], serial: int) -> None:
        """Look at the first and the last element of each tensor, in few microseconds.

        Raises
        ------
        AssertionError
            They are not those of message `serial`.
        """
        for index, (tensor, places) in enumerate(zip(tensors, self._places, strict=True)):
            got = tensor.view(torch.int32)
            first = _stamp(serial, index)
            if got[0].item() != first or got[-1].item() != first + len(places) - 1:
                raise AssertionError(f"message {serial}, tensor {index}: not the bytes of this message")

    def _faults(self, tensors: Sequence[torch.Tensor], serial: int, everything: bool) -> Iterator[str]:
        for index, (tensor, content, places) in enumerate(zip(tensors, self._content, self._places, strict=True)):
            got = tensor.view(torch.int32)
            stamps = _stamps(serial, index, len(places))
            if got.shape != content.shape or not torch.equal(got[places], stamps):
                yield f"message {serial}, tensor {index}: not the bytes of this message"
            elif everything:
                content[places] = stamps
                if not torch.equal(got, content):
                    yield f"message {serial}, tensor {index}: wrong bytes"
