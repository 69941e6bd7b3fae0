"""What this machine allows shmx to do: one function per question, each answers a finding and, if need be, a remedy."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pickle
import platform
import re
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch

from shmx import _core
from shmx.arena import Arena
from shmx.config import ArenaConfig, check_variable, environment_settings
from shmx.survey import arenas, counted, prospect, shown_bytes

__all__ = ["CHECKS", "Finding", "diagnose"]

Status = Literal["ok", "warn", "fail"]

_MIB = 1 << 20
_LARGEST_DEFAULT = 64 << 30
_DRIVER_TIMEOUT_S = 30
# A cgroup of version 1 without a limit has one of nearly 2^63.
_NO_LIMIT = 1 << 60
# What other modules read themselves.
_OTHER_SETTINGS = {"SHMX_CUDA_DRIVER", "SHMX_HIP_DRIVER", "SHMX_SGLANG"}
_FEWEST_FILES, _FEWEST_INODES = 256, 1024


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    check: str
    status: Status
    finding: str
    remedy: str = ""


def check_kernel(release: str | None = None) -> Finding:
    """Open-file-description locks came with Linux 3.15, MADV_POPULATE with 5.14."""
    release = platform.release() if release is None else release
    found = re.match(r"(\d+)\.(\d+)", release)
    what = f"Linux {release}"
    if found is None:
        return Finding("kernel", "warn", f"{what}: its version cannot be read", "shmx needs Linux 3.15, better 5.14")
    version = int(found[1]), int(found[2])
    if version < (3, 15):
        return Finding("kernel", "fail", f"{what} has no open-file-description locks", "use Linux 5.14 or newer")
    if version < (5, 14):
        return Finding(
            "kernel",
            "warn",
            f"{what} has no MADV_POPULATE: new memory is faulted in page by page when it is first used",
            "use Linux 5.14 or newer, or set SHMX_RESERVE and send a first request to warm up",
        )
    return Finding("kernel", "ok", what)


def check_shm_directory(directory: str = "/dev/shm", mounts: str = "/proc/self/mounts") -> Finding:
    """The directory of all segments is there, is memory, and may be written."""
    if not os.path.isdir(directory):
        remedy = f"mount one: mount -t tmpfs -o size=8g tmpfs {directory}"
        return Finding("shm directory", "fail", f"{directory} is not there", remedy)
    if not os.access(directory, os.W_OK | os.X_OK):
        remedy = f"chmod 1777 {directory}, or run as a user who may write there"
        return Finding("shm directory", "fail", f"{directory} may not be written by user id {os.geteuid()}", remedy)
    kinds = [words[2] for line in Path(mounts).read_text().splitlines() if (words := line.split())[1] == directory]
    kind = kinds[-1] if kinds else "no file system of its own"
    if kind != "tmpfs":
        remedy = f"mount a tmpfs there: mount -t tmpfs -o size=8g tmpfs {directory}"
        return Finding("shm directory", "warn", f"{directory} is {kind}, not tmpfs: it may not be memory", remedy)
    return Finding("shm directory", "ok", f"{directory} is a tmpfs that may be written")


def check_shm_size(
    size: int | None = None, free: int | None = None, environment: Mapping[str, str] = os.environ
) -> Finding:
    """What /dev/shm holds, against the capacity that an arena would have."""
    if size is None or free is None:
        facts = os.statvfs("/dev/shm")
        size, free = facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize
    capacity, source = _capacity(size, environment)
    what = f"{shown_bytes(size)}, {shown_bytes(free)} free; an arena takes up to {shown_bytes(capacity)} ({source})"
    gib = max(8, -(-max(2 * size, capacity) >> 30))
    enlarge = f"enlarge it: docker run --shm-size={gib}g, or mount -o remount,size={gib}g /dev/shm"
    if free < _MIB:
        return Finding("shm size", "fail", what, f"remove what fills it (shmx gc, ls -l /dev/shm), or {enlarge}")
    if capacity > size:
        return Finding("shm size", "warn", what, f"lower SHMX_CAPACITY, or {enlarge}")
    if size <= 64 * _MIB:
        return Finding("shm size", "warn", f"{what}; 64 MiB is the default of a container", enlarge)
    if capacity > free:
        return Finding("shm size", "warn", what, "see what fills it: shmx ls, ls -l /dev/shm; shmx gc removes orphans")
    return Finding("shm size", "ok", what)


def _capacity(size: int, environment: Mapping[str, str]) -> tuple[int, str]:
    try:
        given = ArenaConfig.from_environment({"SHMX_CAPACITY": environment["SHMX_CAPACITY"]}).given()
        return given["capacity"], "SHMX_CAPACITY"
    except (KeyError, ValueError):
        return min(size // 2, _LARGEST_DEFAULT), "the default"


def check_shm_inodes(total: int | None = None, free: int | None = None) -> Finding:
    """Each arena takes an inode for its control segment and one for each data segment."""
    if total is None or free is None:
        facts = os.statvfs("/dev/shm")
        total, free = facts.f_files, facts.f_favail
    if total == 0:
        return Finding("shm inodes", "ok", "no limit")
    what = f"{free} of {total} free"
    remedy = "remove files from /dev/shm, or mount -o remount,nr_inodes=1m /dev/shm"
    if free == 0:
        return Finding("shm inodes", "fail", what, remedy)
    return Finding("shm inodes", "warn" if free < _FEWEST_INODES else "ok", what, remedy * (free < _FEWEST_INODES))


def check_memory_cgroup(room: int | Literal["ask"] | None = "ask", size: int | None = None) -> Finding:
    """Shared memory counts towards the memory cgroup, whose end is a kill and no error."""
    if room == "ask":
        room = _core.memory_cgroup_room()
    if room is None or room > _NO_LIMIT:
        return Finding("memory cgroup", "ok", "no limit")
    if size is None:
        facts = os.statvfs("/dev/shm")
        size = facts.f_blocks * facts.f_frsize
    capacity, _ = _capacity(size, os.environ)
    what = f"{shown_bytes(room)} left"
    if room < capacity:
        return Finding(
            "memory cgroup",
            "warn",
            f"{what}, less than the {shown_bytes(capacity)} that an arena may take",
            "raise the container's memory limit, or lower SHMX_CAPACITY: shared memory counts as the container's",
        )
    return Finding("memory cgroup", "ok", what)


def check_huge_pages(directory: str = "/sys/kernel/mm/transparent_hugepage") -> Finding:
    """Private copies are made in huge pages where the kernel gives them."""
    chosen = {name: _chosen(Path(directory, name)) for name in ("enabled", "shmem_enabled")}
    what = f"private memory: {chosen['enabled']}, shared memory: {chosen['shmem_enabled']}"
    if chosen["enabled"] in ("never", "not known"):
        remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: materialize() then faults less"
        return Finding("huge pages", "warn", what, remedy)
    return Finding("huge pages", "ok", what)


def _chosen(path: Path) -> str:
    try:
        found = re.search(r"\[(\w+)\]", path.read_text())
    except OSError:
        found = None
    return found[1] if found else "not known"


def check_memlock(limit: int | None = None) -> Finding:
    """The limit on locked memory: it is not for pages that a device driver locks."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    what = "no limit" if limit == resource.RLIM_INFINITY else shown_bytes(limit)
    return Finding("memlock", "ok", f"{what}; drivers of devices lock pages without it")


def check_open_files(limit: int | None = None) -> Finding:
    """One descriptor stays open per arena, others for moments."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    what = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} descriptors"
    if limit != resource.RLIM_INFINITY and limit < _FEWEST_FILES:
        return Finding("open files", "warn", what, "raise it: ulimit -n 4096")
    return Finding("open files", "ok", what)


def check_locks(directory: str = "/dev/shm") -> Finding:
    """A lock that one open file description takes is seen through another and ends with the first."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="shmx-doctor-", dir=directory)
    except OSError as error:
        return Finding("locks", "fail", f"no file can be made in {directory}: {error.strerror}", "see shm directory")
    try:
        other = os.open(path, os.O_RDWR)
    finally:
        os.unlink(path)
    request = struct.Struct("@hhqqi4x")
    ask = request.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, ask)
        taken = request.unpack(fcntl.fcntl(other, fcntl.F_OFD_GETLK, ask))[0] != fcntl.F_UNLCK
        os.close(descriptor)
        descriptor = -1
        free = request.unpack(fcntl.fcntl(other, fcntl.F_OFD_GETLK, ask))[0] == fcntl.F_UNLCK
    except OSError as error:
        remedy = "shmx needs open-file-description locks (F_OFD_SETLK): another kernel or sandbox"
        return Finding("locks", "fail", f"the kernel refuses them: {error.strerror}", remedy)
    finally:
        os.close(other)
        if descriptor >= 0:
            os.close(descriptor)
    if not (taken and free):
        remedy = "shmx cannot tell here who is alive: another kernel or sandbox"
        return Finding("locks", "fail", f"a lock was seen: {taken}, its end was seen: {free}", remedy)
    return Finding("locks", "ok", "open-file-description locks work")


def check_arena() -> Finding:
    """An arena of 1 MiB, and a tensor through a pickle."""
    try:
        with Arena(capacity=_MIB) as arena:
            sent = torch.arange(1024)
            handle = arena.share(sent)
            loaded = pickle.loads(pickle.dumps(handle))
            states = [one["state"] for one in arenas() if one["name"] == arena.name]
            same = torch.equal(loaded.view(), sent)
            loaded.release()
            handle.release()
    except (OSError, RuntimeError, ValueError) as error:
        return Finding("arena", "fail", str(error), "the message tells it")
    if states != ["alive"] or not same:
        what = f"the arena was {', '.join(states) or 'not there'}, the tensor was {'' if same else 'not '}the same"
        return Finding("arena", "fail", what, "report it, with the kernel and the container runtime")
    return Finding("arena", "ok", "a tensor was published, pickled, loaded and viewed")


def check_numa(directory: str = "/sys/devices/system/node", refusal: int | Literal["ask"] | None = "ask") -> Finding:
    """Where memory can lie, and whether the kernel may be told."""
    try:
        nodes = Path(directory, "has_memory").read_text().strip()
    except OSError:
        nodes = "0"
    if refusal == "ask":
        refusal = _mbind_refusal()
    what = f"memory on node {nodes}"
    if refusal is None:
        return Finding("numa", "ok", f"{what}; mbind works")
    what = f"{what}; mbind is refused: {os.strerror(refusal)}"
    if nodes == "0":
        return Finding("numa", "ok", f"{what}, which matters on several nodes only")
    remedy = "allow mbind (docker run --cap-add=SYS_NICE), or start the producer on the node (numactl)"
    return Finding("numa", "warn", what, remedy)


def _mbind_refusal() -> int | None:
    import ctypes
    import errno
    import mmap

    number = {"x86_64": 237, "aarch64": 235}.get(platform.machine())
    if number is None:
        return errno.ENOSYS
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        word = ctypes.c_char.from_buffer(page)
        call = ctypes.CDLL(None, use_errno=True).syscall
        arguments = (ctypes.c_void_p(ctypes.addressof(word)), mmap.PAGESIZE, 0, None, 0, 0)
        failed = call(ctypes.c_long(number), *arguments) != 0
        code = ctypes.get_errno()
        del word
    return code if failed else None


_DRIVER_PROGRAM = """
import ctypes, json
import os
driver = ctypes.CDLL(os.environ.get("SHMX_CUDA_DRIVER") or "libcuda.so.1")
code, version, count = driver.cuInit(0), ctypes.c_int(), ctypes.c_int()
driver.cuDriverGetVersion(ctypes.byref(version))
if code == 0:
    driver.cuDeviceGetCount(ctypes.byref(count))
locked = None
if count.value:
    import mmap, os
    descriptor = os.memfd_create("shmx-doctor")
    os.ftruncate(descriptor, 1 << 20)
    memory = mmap.mmap(descriptor, 1 << 20)
    address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    device, context = ctypes.c_int(), ctypes.c_void_p()
    locked = driver.cuDeviceGet(ctypes.byref(device), 0)
    locked = locked or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    locked = locked or driver.cuCtxPushCurrent_v2(context)
    locked = locked or driver.cuMemHostRegister_v2(address, ctypes.c_size_t(1 << 20), 1)
    locked = locked or driver.cuMemHostUnregister(address)
print(json.dumps([code, version.value, count.value, locked]))
"""


def check_cuda(program: str = _DRIVER_PROGRAM, environment: Mapping[str, str] = os.environ) -> Finding:
    """The driver, asked by a process of its own: once initialized it would stay in this one."""
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-c", program],
            capture_output=True,
            text=True,
            timeout=_DRIVER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding("cuda", "warn", f"the driver did not answer for {_DRIVER_TIMEOUT_S} s", "see nvidia-smi")
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or [f"status {answer.returncode}"])[-1]
        if "libcuda.so.1" in last and "No such file" in last:
            return Finding("cuda", "ok", "no driver (libcuda.so.1): tensors stay on the CPU")
        return Finding("cuda", "warn", f"the driver cannot be asked: {last}", "see nvidia-smi")
    code, version, count, locked = json.loads(answer.stdout)
    what = f"driver for CUDA {version // 1000}.{version % 1000 // 10}"
    if code != 0:
        remedy = "see nvidia-smi; in a container, start it with --gpus all"
        return Finding("cuda", "warn", f"{what} fails to initialize: code {code}", remedy)
    what = f"{what}, {counted(count, 'device')}"
    if locked is None:
        return Finding("cuda", "warn", what, "see CUDA_VISIBLE_DEVICES; in a container, start it with --gpus all")
    if locked != 0:
        remedy = "copies go by way of a staging buffer; see the memory limit of the container and the driver's log"
        return Finding("cuda", "warn", f"{what}; it refuses to lock shared memory: code {locked}", remedy)
    budget = environment.get("SHMX_PIN_BYTES")
    limit = "" if budget is None else f", up to SHMX_PIN_BYTES={budget}"
    return Finding("cuda", "ok", f"{what}; shared memory is page-locked for it{limit}")


def check_torch() -> Finding:
    """The torch that is imported, and its DLPack interface."""
    what = f"torch {torch.__version__}"
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return Finding("torch", "fail", f"{what} has no DLPack exchange interface", "pip install -U 'torch>=2.10'")
    return Finding("torch", "ok", f"{what} with the DLPack exchange interface")


def check_leftovers() -> Finding:
    """What dead processes have left in /dev/shm."""
    return _judge_leftovers(arenas())


def _judge_leftovers(found: Iterable[dict[str, object]]) -> Finding:
    removable = [arena for arena in found if prospect(arena)[0] == "removed"]
    strange = [arena for arena in found if arena["state"] in ("damaged", "other version", "headless")]
    if removable:
        size = sum(int(str(arena["memory_bytes"])) for arena in removable)
        what = f"{counted(len(removable), 'arena')} of dead processes, {shown_bytes(size)}"
        return Finding("leftovers", "warn", what, "shmx gc removes them, and so does the next arena that is made")
    if strange:
        what = ", ".join(f"{arena['name']}: {arena['state']}" for arena in strange)
        return Finding("leftovers", "warn", what, "shmx ls tells more")
    orphans = sum(arena["state"] == "orphan" for arena in found)
    return Finding("leftovers", "ok", f"{counted(orphans, 'orphan')} in use" if orphans else "none")


def check_settings(environment: Mapping[str, str] = os.environ) -> Finding:
    """Every ``SHMX_*`` variable is one, and can be read."""
    readable = environment_settings()
    given = sorted(name for name in environment if name.startswith("SHMX_"))
    wrong = []
    for name in readable.intersection(given):
        try:
            check_variable(name, environment[name])
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        return Finding("settings", "fail", "; ".join(sorted(wrong)), "correct or unset them")
    unknown = [name for name in given if name not in readable | _OTHER_SETTINGS]
    if unknown:
        known = ", ".join(sorted(readable | _OTHER_SETTINGS))
        return Finding("settings", "warn", f"no setting of shmx: {', '.join(unknown)}", f"the settings are {known}")
    return Finding("settings", "ok", ", ".join(f"{name}={environment[name]}" for name in given) or "none, all defaults")


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_kernel,
    check_shm_directory,
    check_shm_size,
    check_shm_inodes,
    check_memory_cgroup,
    check_huge_pages,
    check_memlock,
    check_open_files,
    check_locks,
    check_arena,
    check_numa,
    check_cuda,
    check_torch,
    check_leftovers,
    check_settings,
)


def diagnose(checks: Iterable[Callable[[], Finding]] = CHECKS) -> list[Finding]:
    """Ask every question. A check that breaks is a failure of its own and does not keep the others from answering."""
    findings = []
    for check in checks:
        try:
            findings.append(check())
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            findings.append(Finding(name, "fail", f"{type(error).__name__}: {error}", "report it"))
    return findings
