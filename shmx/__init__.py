"""shmx moves torch tensors between the processes of a host through POSIX shared memory.

Publish a tensor once, pickle a handle of about 100 bytes anywhere and any number of times, materialize it on every
rank::

    handle = shmx.share(tensor)
    with shmx.readers(4):              # this pickle will be loaded four times
        blob = pickle.dumps(handle)
    ...
    pickle.loads(blob).view()          # zero-copy, in any process of the host
"""

import logging as _logging
import os as _os
import sys as _sys
import typing as _typing

if _sys.platform != "linux":
    raise ImportError(f"shmx runs on Linux only, not on {_sys.platform}: it needs /dev/shm and Linux file locks")

# First, so that a missing torch says so itself.
import torch as _torch  # noqa: F401

from shmx._core import SharedTensor, readers
from shmx.arena import (
    Arena,
    attach,
    configure,
    default_arena,
    empty,
    gc,
    share,
    share_async,
    share_many,
    stats,
    trim,
)
from shmx.array import SharedArray
from shmx.config import apply_environment as _apply_environment
from shmx.errors import (
    ArenaFullError,
    DeviceError,
    ForeignHostError,
    InvalidHandleError,
    ReleasedError,
    SegmentLostError,
    ShmxError,
    StaleHandleError,
    SystemCallError,
    TooManyPeersError,
)
from shmx.hooks import discard, has_shared, unwrap, wrap
from shmx.metrics import metrics_text
from shmx.pickling import Pickler, Unpickler, dec_hook, dumps, enc_hook, ext_hook, loads
from shmx.survey import arenas
from shmx.walk import register_container

if _typing.TYPE_CHECKING:
    from shmx import distributed as distributed
    from shmx import integrations as integrations
    from shmx.integrations import sglang as _sglang  # noqa: F401
else:
    # Modules that most programs do without, imported on first use. Hidden from type checkers, for which any name of
    # the package would exist otherwise.
    def __getattr__(name):
        import importlib

        if name == "distributed":
            return importlib.import_module("shmx.distributed")
        if name == "integrations":
            # With its modules, which import no framework before they are installed.
            importlib.import_module("shmx.integrations.sglang")
            return _sys.modules["shmx.integrations"]
        raise AttributeError(f"module 'shmx' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), "distributed", "integrations"})


__version__ = "0.1.0"

__all__ = [
    "Arena",
    "ArenaFullError",
    "DeviceError",
    "ForeignHostError",
    "InvalidHandleError",
    "Pickler",
    "ReleasedError",
    "SegmentLostError",
    "SharedArray",
    "SharedTensor",
    "ShmxError",
    "StaleHandleError",
    "SystemCallError",
    "TooManyPeersError",
    "Unpickler",
    "arenas",
    "attach",
    "configure",
    "dec_hook",
    "default_arena",
    "discard",
    "dumps",
    "empty",
    "enc_hook",
    "ext_hook",
    "gc",
    "has_shared",
    "loads",
    "metrics_text",
    "readers",
    "register_container",
    "share",
    "share_async",
    "share_many",
    "stats",
    "trim",
    "unwrap",
    "wrap",
]

# Quiet unless the program asks for it.
_logging.getLogger("shmx").addHandler(_logging.NullHandler())

try:
    _apply_environment()
except ValueError:
    # The diagnostic has to start where settings cannot be read: it says which, and what to do.
    if [_os.path.basename(word) for word in _sys.argv[:2]] not in (["shmx", "doctor"], ["-m", "doctor"]):
        raise

# Where users find them, and what their pickles name.
SharedTensor.__module__ = "shmx"
SharedArray.__module__ = "shmx"
readers.__module__ = "shmx"
