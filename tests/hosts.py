"""Hosts for tests: network and mount namespaces, each with a /dev/shm of its own, joined by a pair of interfaces."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess

from tests.children import BOUND

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

    def run(self, *words: str) -> str:
        """The output of a command there."""
        command = ["nsenter", "--target", str(self.pid), "--net", "--mount", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=BOUND).stdout

    def received_bytes(self) -> int:
        """What has come in over the interface."""
        lines = self.run("cat", "/proc/net/dev").splitlines()
        (line,) = (line for line in lines if line.strip().startswith(f"{self.interface}:"))
        return int(line.partition(":")[2].split()[0])

    def names(self) -> set[str]:
        """What is in its /dev/shm."""
        return set(self.run("ls", "/dev/shm").split())

    def end(self) -> None:
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait(BOUND)
        self._holder.stdout.close()


class Hosts:
    """Two hosts that can reach each other."""

    def __init__(self, shm_bytes: tuple[int, int] = (256 << 20, 256 << 20)) -> None:
        self.hosts = [Host(number, size) for number, size in enumerate(shm_bytes)]
        near, far = self.hosts
        pair = f"{near.interface} netns {near.pid} type veth peer {far.interface} netns {far.pid}"
        subprocess.run(["ip", "link", "add", *pair.split()], check=True)
        for host in self.hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", host.interface)
            host.run("ip", "link", "set", host.interface, "up")

    def names(self) -> list[set[str]]:
        """What is in the /dev/shm of each."""
        return [host.names() for host in self.hosts]

    def end(self) -> None:
        for host in self.hosts:
            host.end()


def enter(pid: int, interface: str) -> None:
    """Move this process, which has one thread, to the host that is held by a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = os.getcwd()
    spaces = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("net", "mnt")]
    for space in spaces:
        if libc.setns(space, 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        os.close(space)
    os.chdir(folder)
    os.environ["GLOO_SOCKET_IFNAME"] = interface
