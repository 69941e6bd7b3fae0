"""Settings of the default arena: arguments of :func:`shmx.configure`, or environment variables ``SHMX_*``."""

from __future__ import annotations

import grp
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from operator import index
from typing import Any, SupportsFloat, SupportsIndex

from shmx import _core

__all__ = ["ArenaConfig", "apply_environment", "check_variable", "default_min_bytes", "environment_settings"]

BACKENDS = ("shm", "memfd", "auto")

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


_LEAST_BYTES = mmap.PAGESIZE
_MOST_BYTES = 1 << 46
_NO_GROUP = (1 << 32) - 1  # what chown takes for "leave it"


def _bytes(name: str, text: str, least: int = _LEAST_BYTES) -> int:
    number, unit = text.strip().lower().removesuffix("ib").removesuffix("b"), 1
    if number and number[-1] in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1]]
    try:
        size = int(float(number) * unit) if "." in number else int(number) * unit
    except (ValueError, OverflowError):
        raise ValueError(f"{name}={text!r} is not a size; give bytes, or a number with KiB, MiB or GiB") from None
    return _in_range(name, text, size, least)


def _in_range(name: str, given: object, size: int, least: int = _LEAST_BYTES) -> int:
    if not least <= size <= _MOST_BYTES:
        raise ValueError(f"{name}={given!r} is out of range; give a size between {least} bytes and 64 TiB")
    return size


def _seconds(name: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number of seconds") from None
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{name}={text!r} is out of range; give seconds, 0 or more")
    return seconds


def _node(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} is not a NUMA node; give its number")
    return int(text)


def group_id(group: int | str, name: str = "group") -> int:
    """Find the number of a group that is given by number or by name; raises ``ValueError`` if there is none."""
    if isinstance(group, str) and not group.isdecimal():
        try:
            return grp.getgrnam(group).gr_gid
        except KeyError:
            raise ValueError(f"{name}={group!r} is no group of this system; give its name or its number") from None
    if not isinstance(group, (int, str)):
        raise TypeError(f"{name}={group!r} is no group; give its name or its number")
    if not 0 <= int(group) < _NO_GROUP:
        raise ValueError(f"{name}={group!r} is no group; give its name or its number")
    return int(group)


def _backend(name: str, text: object) -> str:
    if not isinstance(text, str) or text not in BACKENDS:
        raise ValueError(f"{name}={text!r} is not a backend; give one of {', '.join(BACKENDS)}")
    return text


def _flag(name: str, text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(f"{name}={text!r} is not a flag; give 1 or 0")


def _set_min_bytes(size: int) -> None:
    global _min_bytes
    _min_bytes = size


_min_bytes = 64 << 10

# How each setting of the whole process is read, and where it goes.
_OF_THE_PROCESS: dict[str, tuple[Callable[[str, str], Any], Callable[[Any], None]]] = {
    "SHMX_POOL_BYTES": (partial(_bytes, least=0), _core.set_pool_limit),
    "SHMX_PIN_BYTES": (partial(_bytes, least=0), _core.set_pin_limit),
    "SHMX_READONLY": (_flag, _core.set_read_only),
    "SHMX_NT_THRESHOLD": (partial(_bytes, least=1), _core.set_non_temporal_threshold),
    "SHMX_GROUP": (lambda name, text: group_id(text, name), _core.set_trusted_group),
    "SHMX_MIN_BYTES": (partial(_bytes, least=0), _set_min_bytes),
}


# What arguments are: the same, but numbers and truths are no texts.


def _size_of(name: str, value: object) -> int:
    if isinstance(value, str):
        return _bytes(name, value)
    if not isinstance(value, SupportsIndex):
        raise TypeError(f"{name}={value!r} is not a size; give a whole number of bytes, or a text such as '8GiB'")
    return _in_range(name, value, index(value))


def _time_of(name: str, value: object) -> float:
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}={value!r} is not a number of seconds; give one, 0 or more")
    seconds = float(value)
    if not seconds >= 0:
        raise ValueError(f"{name}={value!r} is out of range; give seconds, 0 or more")
    return seconds


def _truth_of(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is not a flag; give True or False")
    return value


def _node_of(name: str, value: object) -> int:
    if not isinstance(value, SupportsIndex):
        raise TypeError(f"{name}={value!r} is not a NUMA node; give its number")
    return _node(name, str(index(value)))


def _group_of(name: str, value: Any) -> int:
    return group_id(value, name)


_ARGUMENTS: dict[str, Callable[[str, object], Any]] = {
    "capacity": _size_of,
    "segment_bytes": _size_of,
    "ticket_ttl": _time_of,
    "reuse_delay": _time_of,
    "scrub": _truth_of,
    "reserve": _size_of,
    "numa_node": _node_of,
    "group": _group_of,
    "backend": _backend,
}


def apply_environment() -> None:
    """Set what holds for the whole process, when the package is imported.

    ``SHMX_POOL_BYTES``: private memory that is kept for materialized tensors; 0 keeps none. ``SHMX_PIN_BYTES``: shared
    memory that may be page-locked for devices, by default all; 0 locks none. ``SHMX_READONLY``: map
    other processes' arenas read-only. ``SHMX_NT_THRESHOLD``: copies of so many bytes and more use non-temporal stores.
    ``SHMX_GROUP``: accept arenas of other user ids that were made for this group, see :class:`ArenaConfig`.
    ``SHMX_MIN_BYTES``: smaller tensors are left inline by :func:`shmx.wrap` and :func:`shmx.dumps`.
    Raises ``ValueError`` that names the variable if one cannot be read.
    """
    for name, (read, apply) in _OF_THE_PROCESS.items():
        if (text := os.environ.get(name)) is not None:
            apply(read(name, text))


def environment_settings() -> set[str]:
    """Names of the environment variables that this module reads."""
    return {*_OF_THE_PROCESS, *(f"SHMX_{field.name.upper()}" for field in fields(ArenaConfig))}


def check_variable(name: str, text: str) -> None:
    """Raise the ``ValueError`` that a variable of :func:`environment_settings` deserves, if it cannot be read."""
    if name in _OF_THE_PROCESS:
        _OF_THE_PROCESS[name][0](name, text)
    ArenaConfig.from_environment({name: text})


def default_min_bytes() -> int:
    """Bytes below which a tensor travels in the pickle, unless a call says otherwise."""
    return _min_bytes


@dataclass(frozen=True)
class ArenaConfig:
    """What an arena is made with. ``None`` leaves the choice to shmx.

    Raises ``ValueError`` or ``TypeError`` that names the setting if it is none. Sizes are bytes, or texts such as
    ``"8GiB"``, and are kept as bytes.

    Parameters
    ----------
    capacity
        Bytes of shared memory at most; taken from the system only as used. Default: the lesser of 64 GiB and half of
        /dev/shm, or with ``memfd`` half of the memory that the machine and the cgroup have available.
        Environment: ``SHMX_CAPACITY``.
    segment_bytes
        Size of a data segment in bytes; a larger tensor gets a segment of its own. Default 256 MiB.
        Environment: ``SHMX_SEGMENT_BYTES``.
    ticket_ttl
        Seconds after which a message that nobody has loaded may be given up under memory pressure. Default 300.
        Environment: ``SHMX_TICKET_TTL``.
    reuse_delay
        Seconds that a block rests after its last release if a handle of it was pickled without a reader count.
        Default 0.1. Environment: ``SHMX_REUSE_DELAY``.
    scrub
        Clear a block, to its last byte, when it is handed out for another tensor: before anybody has a handle of it,
        and so before what lay there can be seen through one. What is free or idle is not cleared until then. Default
        off: no handle reaches beyond what was published, though who may map the segment can read the rest.
        Environment: ``SHMX_SCRUB``.
    reserve
        Bytes to take from the system in the background as soon as the arena is made, so that a burst of requests does
        not wait for them. Default: a few MiB ahead of what is in use. Environment: ``SHMX_RESERVE``.
    numa_node
        The NUMA node whose memory to prefer. Default: that of the processor on which the arena is made.
        Environment: ``SHMX_NUMA_NODE``.
    group
        A group, by name or number, whose members may attach although their user ids differ (containers that run as
        different users): segments get that group and mode 0660 instead of 0600. The process has to be in it. A reader
        accepts an arena of another user id only if that is its mode, if its group is one of the reader's, and if the
        reader has set the same group by ``SHMX_GROUP`` or :func:`shmx.configure`. Members can read and write
        everything in the arena. Removing what a dead producer has left is up to its own user id, since /dev/shm is
        sticky. Default: arenas are private to one user id. Environment: ``SHMX_GROUP``.
    backend
        ``"shm"`` (default): files with names in /dev/shm. ``"memfd"``: one file without a name, which /dev/shm does not
        bound and nobody can truncate, and which the kernel frees with the last process that uses it; consumers open
        it through /proc, so they must be of the same PID namespace and load their first handle, or call
        :func:`shmx.attach`, while the producer lives. ``"auto"``: ``"shm"``, unless /dev/shm has less room than
        ``capacity`` (or, without one, is smaller than 1 GiB); then ``"memfd"``, with one warning.
        Environment: ``SHMX_BACKEND``.
    """

    capacity: int | str | None = None
    segment_bytes: int | str | None = None
    ticket_ttl: float | None = None
    reuse_delay: float | None = None
    scrub: bool | None = None
    reserve: int | str | None = None
    numa_node: int | None = None
    group: int | str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        """Check what was given."""
        for name, value in self.given().items():
            object.__setattr__(self, name, _ARGUMENTS[name](name, value))

    def given(self) -> dict[str, Any]:
        """Settings that are not left to shmx."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ArenaConfig:
        """Read ``SHMX_*``; raises ``ValueError`` that names the variable if one cannot be read."""
        values: dict[str, int | float | bool | str] = {}
        for field in fields(cls):
            name = f"SHMX_{field.name.upper()}"
            text = environment.get(name)
            if text is None:
                continue
            if field.name in ("capacity", "segment_bytes", "reserve"):
                values[field.name] = _bytes(name, text)
            elif field.name == "numa_node":
                values[field.name] = _node(name, text)
            elif field.name == "group":
                values[field.name] = group_id(text, name)
            elif field.name == "backend":
                values[field.name] = _backend(name, text)
            elif field.name == "scrub":
                values[field.name] = _flag(name, text)
            else:
                values[field.name] = _seconds(name, text)
        return cls(**values)  # type: ignore[arg-type]
