"""Real processes for tests: spawned or forked, joined with a bound, killed if left, and only then judged."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

BOUND = 120.0


class ChildFailed(AssertionError):
    """A child raised; the message is its traceback."""


def _run(connection: Connection, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = target(connection, *arguments)
        connection.send(("result", result))
    except BaseException:
        connection.send(("error", traceback.format_exc()))
        raise


class Child:
    """One process that runs ``target(connection, *arguments)``; its return value comes back by ``result()``."""

    def __init__(self, start_method: str, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context(start_method)
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=_run, args=(far_end, target, arguments))
        self.process.start()
        far_end.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def send(self, message: Any) -> None:
        self.connection.send(message)

    def receive(self) -> Any:
        """The next object that the child sends; fails after BOUND seconds or when the child has failed."""
        if not self.connection.poll(BOUND):
            raise ChildFailed(f"child {self.pid} sent nothing for {BOUND} s")
        message = self.connection.recv()
        if isinstance(message, tuple) and len(message) == 2 and message[0] == "error":
            raise ChildFailed(message[1])
        return message

    def result(self) -> Any:
        """Wait for the child's return value and its end."""
        kind, value = self.receive()
        assert kind == "result", f"child {self.pid} sent {kind!r} where its result was due"
        self.join()
        return value

    def join(self) -> int:
        self.process.join(BOUND)
        if self.process.is_alive():
            self.kill()
            raise ChildFailed(f"child {self.pid} did not end within {BOUND} s")
        self.connection.close()
        code = self.process.exitcode
        assert code is not None
        return code

    def kill(self) -> None:
        """SIGKILL, reaped."""
        if self.process.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        self.process.join(BOUND)
        self.connection.close()


class Children:
    """The processes of one test."""

    def __init__(self) -> None:
        self._started: list[Child] = []

    def start(self, target: Callable[..., Any], *arguments: Any, method: str = "spawn") -> Child:
        """Run ``target(connection, *arguments)`` in a process; ``target`` is a module-level function."""
        child = Child(method, target, arguments)
        self._started.append(child)
        return child

    def kill(self) -> None:
        for child in self._started:
            if child.process.is_alive():
                child.kill()
