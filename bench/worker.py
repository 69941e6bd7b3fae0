"""One process that a question measures in: it builds an object, answers calls of its methods over a pipe, and ends.

Waits are bounded, a child that raises raises here, and one that is left at the end is killed. By default workers are
forked from a server that has imported shmx and done nothing with it: they begin like any fresh process, without the
seconds that each import of torch takes. Such a process shares pages with the server until it writes to them, so one
whose page faults are counted must be spawned.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from .process_tree import MeasurementError

__all__ = ["Worker", "WorkerError"]

BOUND = 120.0


class WorkerError(MeasurementError):
    """A worker raised (the message is its traceback), died or gave no answer."""


class Worker:
    """A process that owns ``factory(*arguments)``.

    Parameters
    ----------
    factory
        Module-level class or function; what it returns answers the calls.
    arguments
        What it is called with.
    method
        ``forkserver`` or ``spawn``.
    """

    def __init__(self, factory: Callable[..., Any], *arguments: Any, method: str = "forkserver") -> None:
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload([__name__])
        self._connection, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, factory, arguments), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        far.close()

    def send(self, name: str, *arguments: Any) -> None:
        """Begin a call; `receive` gives its result."""
        self._connection.send((name, arguments))

    def receive(self) -> Any:
        """The result of the oldest call that was sent."""
        try:
            if not self._connection.poll(BOUND):
                raise WorkerError(f"process {self.process.pid} gave no answer for {BOUND:.0f} s")
            failed, result = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise WorkerError(f"process {self.process.pid} died") from error
        if failed:
            raise WorkerError(result)
        return result

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of one method call."""
        self.send(name, *arguments)
        return self.receive()

    def __enter__(self) -> Worker:
        """Use the process in a ``with`` block."""
        return self

    def __exit__(
        self, type: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process; kill it if it does not end."""
        try:
            if type is None:
                self._connection.send(None)
                self.process.join(BOUND)
        except BrokenPipeError:
            # It died; what it was asked last has said so.
            pass
        finally:
            self.process.kill()
            self.process.join()
            self._connection.close()


def _serve(connection: Connection, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # The other processes of a question need the other cores; what shmx does uses one thread anyway.
    torch.set_num_threads(1)
    made: Any = None
    while (call := connection.recv()) is not None:
        name, values = call
        try:
            if made is None:
                made = factory(*arguments)
            answer = (False, getattr(made, name)(*values))
        except Exception:
            answer = (True, traceback.format_exc())
        connection.send(answer)
