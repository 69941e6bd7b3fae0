"""Each system call of an operation of the package fails once, with each errno that can happen there.

The core alone is checked by tests/fault/points/failed_calls.cpp. Here it is the whole package: an error of one of its
classes or ``MemoryError``, or none; a second attempt that succeeds; no segment, descriptor or byte left.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHM = Path("/dev/shm")
BOUND_S = 250
MIB = 1 << 20

# x86-64; what is not listed cannot fail, or fails in ways that are not ours to answer.
ERRNOS = {
    77: ("ftruncate", (errno.EFBIG, errno.EPERM)),
    285: ("fallocate", (errno.ENOSPC, errno.EINTR, errno.EOPNOTSUPP)),
    9: ("mmap", (errno.ENOMEM, errno.EAGAIN)),
    28: ("madvise", (errno.ENOMEM, errno.EINVAL)),
    72: ("fcntl", (errno.ENOLCK,)),
    257: ("openat", (errno.EMFILE, errno.ENFILE, errno.ENOMEM)),
    137: ("statfs", (errno.ENOMEM,)),
    87: ("unlink", (errno.EACCES,)),
    17: ("pread", (errno.EIO,)),
    217: ("getdents", (errno.EIO,)),
    318: ("getrandom", (errno.ENOSYS,)),
}


# ---- operations: prepare() answers what perform() is given; perform() may be done again ----


def _filled(value: int, count: int) -> Any:
    import torch

    return torch.full((count,), value, dtype=torch.uint8)


def _share_first() -> Callable[[], Any]:
    import shmx

    return lambda: _check(shmx.share(_filled(1, 64)), 1)


def _share_large() -> Callable[[], Any]:
    import shmx

    kept = shmx.share(_filled(2, 64))
    return lambda: (kept, _check(shmx.share(_filled(1, 6 * MIB)), 1))


def _empty() -> Callable[[], Any]:
    import torch

    import shmx

    return lambda: _check(shmx.share(shmx.empty((2 * MIB,), dtype=torch.uint8).fill_(1)), 1)


def _send() -> Callable[[], Any]:
    import shmx

    handle = shmx.share(_filled(1, 64))
    return lambda: _check(pickle.loads(pickle.dumps(handle)), 1)


def _materialize() -> Callable[[], Any]:
    import shmx

    handle = shmx.share(_filled(1, MIB))

    def perform() -> Any:
        private = handle.materialize()
        assert bool((private == 1).all())

    return perform


def _trim() -> Callable[[], Any]:
    import shmx

    for _ in range(2):
        shmx.share(_filled(1, 6 * MIB)).release()
    return lambda: shmx.trim()


def _collect() -> Callable[[], Any]:
    import shmx

    handle = shmx.share(_filled(1, 64))
    return lambda: (shmx.gc(), _check(handle, 1))


def _own_arena() -> Callable[[], Any]:
    import shmx

    def perform() -> None:
        with shmx.Arena(capacity=4 * MIB) as arena:
            _check(arena.share(_filled(1, 64)), 1)

    return perform


def _check(handle: Any, value: int) -> Any:
    assert bool((handle.view() == value).all())
    return handle


OPERATIONS = [_share_first, _share_large, _empty, _send, _materialize, _trim, _collect, _own_arena]


# ---- in a process and a /dev/shm of their own ----


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _give_everything_back() -> None:
    from shmx import _core

    gc.collect()
    _core.leave_all()
    _core.clear_pool()
    _core.reap(force=True)


def _in_child(failer: ctypes.CDLL, prepare: Callable[[], Callable[[], Any]]) -> str:
    """What is wrong, in the child; empty if nothing is."""
    import shmx

    prepare()()  # what is imported or cached at first use
    _give_everything_back()
    before = _descriptors()
    perform = prepare()
    outcome = "done"
    failer.shmx_enter_trace()
    try:
        perform()
    except (shmx.ShmxError, MemoryError) as error:
        outcome = f"{type(error).__name__}: {error}"
        del error
    except OSError as error:
        outcome = f"OSError: {error}" if "shmx" in str(error) or "/dev/shm" in str(error) else f"no object: {error!r}"
        del error
    finally:
        failer.shmx_leave_trace()
    if outcome.startswith("no object"):
        return outcome
    try:
        perform()
    except Exception as error:
        return f"after {outcome}: fails again: {error!r}"
    del perform
    _give_everything_back()
    left = [path.name for path in SHM.iterdir()]
    if left:
        return f"after {outcome}: left {left}"
    if (more := _descriptors() - before) > 0:
        return f"after {outcome}: {more} descriptors leaked"
    return ""


def _fork(failer: ctypes.CDLL, prepare: Callable[[], Callable[[], Any]]) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            wrong = _in_child(failer, prepare)
        except BaseException:
            wrong = traceback.format_exc()
        os.write(writer, wrong.encode()[:60000])
        os._exit(0)
    os.close(writer)
    return pid, reader


def _result(pid: int, reader: int) -> str:
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return text or ("" if status == 0 else f"ended with status {status}")


def main(library: str, name: str) -> None:
    failer = ctypes.CDLL(library)
    failer.shmx_list_calls.restype = ctypes.c_int64
    import torch

    import shmx

    torch.set_num_threads(1)
    assert shmx.__name__ == "shmx"
    # What is imported by now is no garbage, and a collection in each child would copy all of it.
    gc.collect()
    gc.freeze()
    prepare = globals()[name]
    numbers = (ctypes.c_uint64 * 10000)()
    pid, reader = _fork(failer, prepare)
    count = failer.shmx_list_calls(pid, numbers, len(numbers))
    assert _result(pid, reader) == "", "it fails by itself"
    assert 0 <= count <= len(numbers)
    every = os.environ.get("SHMX_LONG") == "1"
    points = 0
    wrong = []
    for n in range(count):
        call, errnos = ERRNOS.get(numbers[n], ("", ()))
        for number in errnos if every else errnos[:1]:
            pid, reader = _fork(failer, prepare)
            failed = failer.shmx_fail_call(pid, ctypes.c_int64(n), ctypes.c_uint64(numbers[n]), number)
            if failed == 0:
                said = _result(pid, reader)
            else:
                os.close(reader)
                said = "it ended; standard error says how"
            points += 1
            if said:
                wrong.append(f"call {n} ({call}: {errno.errorcode[number]}): {said}")
                for path in SHM.iterdir():
                    path.unlink()
    print(f"{count} calls, {points} failures, {len(wrong)} violations")
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)


@pytest.fixture(scope="module")
def failer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of the system calls are those of x86-64")
    if shutil.which("g++") is None or shutil.which("unshare") is None:
        pytest.skip("g++ or unshare is not installed")
    sources = Path(__file__).with_name("points")
    library = tmp_path_factory.mktemp("failer") / "libcall_failer.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-o", str(library)]
    built = subprocess.run(
        [*command, str(sources / "call_failer.cpp"), str(sources / "tracee.cpp")],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
    )
    assert built.returncode == 0, built.stderr
    return library


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__.strip("_"))
def test_a_failed_call_is_an_error_of_ours_or_none_and_leaves_nothing(failer: Path, operation: Any) -> None:
    """Rule 9, and what goes with it."""
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    driver = [sys.executable, "-m", "tests.fault.test_failed_calls", str(failer), operation.__name__]
    ended = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", *driver],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        env={**os.environ, "SHMX_CAPACITY": str(32 * MIB), "SHMX_SEGMENT_BYTES": str(4 * MIB)},
        cwd=ROOT,
    )
    if "unshare" in ended.stderr:
        pytest.skip(f"no mount namespace of one's own here: {ended.stderr.strip()}")
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr


if __name__ == "__main__":
    main(*sys.argv[1:])
