"""Hosts for tests: network and mount namespaces, each with a /dev/shm of its own, joined by a pair of interfaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.children import BOUND

_ROOT = Path(__file__).parents[1]
_HOLD = "mount -t tmpfs -o size=$0 tmpfs /dev/shm && ip link set lo up && echo ready && read end"


def why_not() -> str | None:
    """Why there can be none here."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm && ip link set lo up"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"namespaces are not permitted: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """A place for processes with its own network and /dev/shm; both end with the last process in it."""

    def __init__(self, number: int, shm_bytes: int) -> None:
        self.interface = f"shmx{number}"
        self.address = f"10.213.77.{number + 1}"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", _HOLD, str(shm_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.pid = self._holder.pid

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", *words]

    def run(self, *words: str) -> str:
        """The output of a command there."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=True, timeout=BOUND).stdout

    def received_bytes(self) -> int:
        """What has come in over the interface."""
        return int(self.run("cat", f"/sys/class/net/{self.interface}/statistics/rx_bytes"))

    def received_by_table(self) -> int:
        (line,) = (
            line for line in self.run("cat", "/proc/net/dev").splitlines() if line.strip().startswith(self.interface)
        )
        return int(line.partition(":")[2].split()[0])

    def names(self) -> set[str]:
        """What is in its /dev/shm."""
        return set(self.run("ls", "/dev/shm").split())

    def end(self) -> None:
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait(BOUND)
        self._holder.stdout.close()


class Process:
    """``function(*arguments)`` of a test module on a host; it answers with JSON lines."""

    def __init__(self, host: Host, module: str, function: str, *arguments: Any) -> None:
        self._process = subprocess.Popen(
            host.command(sys.executable, "-m", "tests.hosts", module, function, json.dumps(arguments)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env={**os.environ, "GLOO_SOCKET_IFNAME": host.interface},
        )

    def receive(self) -> Any:
        """The next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it ended with {self._process.wait(BOUND)} and no answer"
        return json.loads(line)

    def send(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, reaped; idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._close()

    def join(self) -> int:
        try:
            code = self._process.wait(BOUND)
        finally:
            self.kill()
        return code

    def _close(self) -> None:
        self._process.wait(BOUND)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()


class Hosts:
    """Two hosts, and the processes on them."""

    def __init__(self, shm_bytes: tuple[int, int] = (256 << 20, 256 << 20)) -> None:
        self.hosts = [Host(number, size) for number, size in enumerate(shm_bytes)]
        self.processes: list[Process] = []
        first, second = self.hosts
        subprocess.run(
            ["ip", "link", "add", first.interface, "netns", str(first.pid), "type", "veth"]
            + ["peer", "name", second.interface, "netns", str(second.pid)],
            check=True,
        )
        for host in self.hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", host.interface)
            host.run("ip", "link", "set", host.interface, "up")

    def start(self, number: int, module: str, function: str, *arguments: Any) -> Process:
        process = Process(self.hosts[number], module, function, *arguments)
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for host in self.hosts:
            host.end()


class Line:
    """The far end of a :class:`Process`."""

    def send(self, message: Any) -> None:
        print(json.dumps(message), flush=True)

    def recv(self) -> Any:
        return json.loads(sys.stdin.readline())


def main() -> None:
    module, function, arguments = sys.argv[1:]
    import importlib

    getattr(importlib.import_module(module), function)(Line(), *json.loads(arguments))


if __name__ == "__main__":
    main()
