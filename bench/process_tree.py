"""A producer and its consumers as real processes: spawned, watched, bounded, killed if left over."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

__all__ = ["MeasurementError", "Place", "run"]

_JOIN_S = 15.0


class MeasurementError(Exception):
    """A process of a benchmark failed, died or did not end in time."""


@dataclass(frozen=True)
class Place:
    """Where in the tree a process is.

    Attributes
    ----------
    folder
        For sockets; removed at the end.
    consumers
        How many there are.
    index
        Which consumer this is; -1 for the producer.
    lock
        Common to all.
    """

    folder: Path
    consumers: int
    index: int
    lock: Any


def run(
    producer: Callable[..., Any],
    consumer: Callable[..., None],
    consumers: int,
    *arguments: object,
    bound_s: float,
) -> Any:
    """Run ``consumer(place, *arguments)`` several times beside ``producer(place, *arguments)``.

    Returns
    -------
    object
        What `producer` returned.

    Raises
    ------
    MeasurementError
        A process raised, ended early, or the producer returned nothing within `bound_s` seconds.
    """
    context = multiprocessing.get_context("spawn")
    folder = Path(tempfile.mkdtemp(prefix="shmx-bench-"))
    lock = context.Lock()
    children = []
    try:
        for index, entry in [(-1, producer), *((i, consumer) for i in range(consumers))]:
            near, far = context.Pipe(duplex=False)
            place = Place(folder, consumers, index, lock)
            child = context.Process(target=_enter, args=(far, entry, place, arguments), daemon=False)
            child.start()
            far.close()
            children.append((child, near))
        answers = _answers(children, bound_s)
        for child, _ in children:
            child.join(_JOIN_S)
        return answers
    finally:
        for child, near in children:
            if child.is_alive():
                child.kill()
            child.join(_JOIN_S)
            near.close()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(children: list[tuple[Any, Connection[Any, Any]]], bound_s: float) -> Any:
    """Wait for the producer's result, and meanwhile for whoever fails first."""
    deadline = time.monotonic() + bound_s
    names = {near: "producer" if index == 0 else f"consumer {index - 1}" for index, (_, near) in enumerate(children)}
    waiting = set(names)
    producer = children[0][1]
    while producer in waiting:
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise MeasurementError(f"no result within {bound_s:.0f} s")
        for near in ready:
            assert isinstance(near, Connection)
            waiting.discard(near)
            try:
                kind, value = near.recv()
            except EOFError:
                raise MeasurementError(f"{names[near]} died") from None
            if kind == "error":
                raise MeasurementError(f"{names[near]} failed\n{value}")
            if near is producer:
                return value
    raise AssertionError


def _enter(
    connection: Connection[Any, Any], entry: Callable[..., Any], place: Place, arguments: tuple[Any, ...]
) -> None:
    # More threads than cores would only compete.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (place.consumers + 1)))
    try:
        connection.send(("result", entry(place, *arguments)))
    except BaseException:
        connection.send(("error", traceback.format_exc()))
        raise SystemExit(1) from None
