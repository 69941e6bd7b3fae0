"""The ways of the question `broadcast` to move the tensors of a request: those of the demonstration, and two more."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from . import demo_transports

__all__ = ["TRANSPORTS", "Sglang", "ShmxView", "choose", "make", "needs_barrier"]

TRANSPORTS = ("shmx", "shmx_view", "sglang", "segment", "inline")


class ShmxView(demo_transports.Shmx):
    """As shmx, but ranks read the arena instead of a copy of their own."""

    name = "shmx_view"

    def own(self, items: list[Any]) -> tuple[list[Any], list[str | None]]:
        """Views, which hold their block."""
        errors = [type(item.error).__name__ if item.error else None for item in items]
        for i, item in enumerate(items):
            if not errors[i]:
                items[i] = item.view()
        return items, errors


class Sglang(demo_transports.Segment):
    """``ShmPointerMMData`` of the installed SGLang: ranks map the segments copy-on-write, close and unlink."""

    name = "sglang"

    def __init__(self) -> None:
        from .transports.sglang import pointer_class

        self._class = pointer_class()

    def publish(self, tensors: list[torch.Tensor], serial: int) -> list[Any]:
        """A reserved segment for each."""
        return [self._class(tensor) for tensor in tensors]

    def abandon(self, published: list[Any]) -> None:
        """Unlink what nobody has materialized."""
        for pointer in published:
            pointer.close_and_unlink()


def needs_barrier(name: str) -> bool:
    """Whether ranks wait for each other before they own, as SGLang 0.5.23 does; without it some would lose tensors."""
    return name == Sglang.name


def choose(asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names that can run, and a line for each that cannot; raises ``ValueError`` for an unknown one."""
    for name in asked:
        if name not in TRANSPORTS:
            raise ValueError(f"broadcast knows no transport {name!r}; choose from {', '.join(TRANSPORTS)}")
    names = list(asked or TRANSPORTS)
    if Sglang.name in names and importlib.util.find_spec("sglang") is None:
        names.remove(Sglang.name)
        return names, ["sglang: left out, the package sglang is not installed."]
    return names, []


def make(name: str, *, segment_prefix: str) -> demo_transports.Transport:
    """The transport of that name."""
    if name == ShmxView.name:
        return ShmxView()
    if name == Sglang.name:
        return Sglang()
    return demo_transports.make_transport(name, segment_prefix=segment_prefix)
