"""A driver and a torch device without a GPU: built on demand, cached in the build folder, loaded once per process.

The driver (driver.cpp) is given to shmx by ``SHMX_CUDA_DRIVER``, the device (device.cpp) is torch's PrivateUse1 under
the name ``fakegpu``; production code runs on both unchanged.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import torch

import shmx.device

__all__ = ["NAME", "FakeDriver", "Unavailable", "build", "use"]

NAME = "fakegpu"
_HERE = Path(__file__).parent
_BUILD = _HERE.parent.parent / "build" / "fakegpu"


class Unavailable(RuntimeError):
    """It cannot be built here; the message says why."""


def _compile(source: str, target: str, *options: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("no C++ compiler (g++, clang++ or $CXX) to build the fake device with")
    text = (_HERE / source).read_bytes()
    mark = hashlib.sha256(b"\0".join([text, *(option.encode() for option in options), torch.__version__.encode()]))
    library = _BUILD / mark.hexdigest()[:16] / target
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # Two test runs may build at once: each under a name of its own, and the rename decides.
    draft = library.with_name(f"{target}.{os.getpid()}")
    command = [
        *compiler.split(),
        "-shared",
        "-fPIC",
        "-O1",
        "-pthread",
        str(_HERE / source),
        *options,
        "-o",
        str(draft),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{source} does not compile: {result.stderr[:4000]}")
    draft.rename(library)
    return library


def build() -> tuple[Path, Path]:
    """Driver and device, compiled now if they are not yet. The device takes a minute."""
    from torch.utils import cpp_extension

    folders = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    libraries = str(Path(torch.__file__).parent / "lib")
    driver = _compile("driver.cpp", "libcuda.so.1", "-std=c++20", "-Wall", "-Wextra")
    device = _compile(
        "device.cpp", "libfakegpu.so", "-std=c++20", "-w", *folders, f"-L{libraries}", "-lc10", "-ltorch_cpu"
    )
    return driver, device


class FakeDriver:
    """The controls of the driver that this process has loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.fake_count.restype = ctypes.c_long
        self.library.fake_held_calls.restype = ctypes.c_long
        self.library.fake_log.restype = ctypes.c_long
        self.library.fake_registrations.restype = ctypes.c_long

    def fail(self, name: str, skip: int = 0, code: int = 2, *, sticky: bool = False) -> None:
        """The call of that name (without prefix: ``"HostRegister"``) after ``skip`` good ones answers ``code``."""
        self.library.fake_fail(name.encode(), ctypes.c_long(skip), code, int(sticky))

    def break_device(self, index: int, code: int = 700) -> None:
        """Every call for that device answers ``code``."""
        self.library.fake_break(index, code)

    def recover(self) -> None:
        """No more failures."""
        self.library.fake_recover()

    def count(self, name: str) -> int:
        """Calls of that name, or ``registrations``, ``late copies``, ``staged copies``, ``after fork``."""
        return int(self.library.fake_count(name.encode()))

    def log(self) -> list[str]:
        """The calls since :meth:`forget_calls`, in order."""
        room = self.library.fake_log(None, ctypes.c_long(0)) + 4096
        text = ctypes.create_string_buffer(room)
        self.library.fake_log(text, ctypes.c_long(room))
        return text.value.decode().split()

    def forget_calls(self) -> None:
        self.library.fake_forget_calls()

    def registrations(self) -> list[tuple[int, int, int]]:
        """Start, size in bytes and flags of each."""
        room = self.count("registrations") + 64
        triples = (ctypes.c_uint64 * (3 * room))()
        found = self.library.fake_registrations(triples, ctypes.c_long(room))
        return [tuple(triples[3 * i : 3 * i + 3]) for i in range(found)]  # type: ignore[misc]

    def hold_streams(self) -> None:
        """No stream starts another operation."""
        self.library.fake_gate(1)

    def release_streams(self) -> None:
        self.library.fake_gate(0)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Every stream stands still inside."""
        self.hold_streams()
        try:
            yield
        finally:
            self.release_streams()

    def hold_calls(self, name: str) -> None:
        """Calls of that name wait before they do anything; with an empty one all go on."""
        self.library.fake_hold_calls(name.encode())

    def held_calls(self) -> int:
        """How many calls wait."""
        return int(self.library.fake_held_calls())

    def begin_capture(self, stream: torch.Stream) -> None:
        """A graph capture in global mode."""
        assert self.library.cuStreamBeginCapture_v2(ctypes.c_void_p(stream.native_handle), 0) == 0

    def end_capture(self, stream: torch.Stream) -> int:
        """0, or 901 if some call has broken the capture."""
        graph = ctypes.c_void_p()
        return int(self.library.cuStreamEndCapture(ctypes.c_void_p(stream.native_handle), ctypes.byref(graph)))


_loaded: FakeDriver | None = None


def use(driver: Path, device: Path) -> FakeDriver:
    """Make ``fakegpu`` a torch device of this process whose pages shmx can lock."""
    global _loaded
    if _loaded is not None:
        return _loaded
    os.environ["SHMX_CUDA_DRIVER"] = str(driver)
    torch.ops.load_library(str(device))
    library = ctypes.CDLL(str(device))
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(NAME)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": library.fakegpu_current_device,
        "set_device": library.fakegpu_set_device,
        "has_context": library.fakegpu_has_context,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
    }.items():
        setattr(module, name, value)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    shmx.device.DRIVERS[NAME] = "cuda"
    _loaded = FakeDriver(driver)
    return _loaded
