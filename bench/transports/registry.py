"""The transports by name, and which of them can run here."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

__all__ = ["ALL", "DEFAULT", "choose", "load"]

PACKAGES = {
    "shmx": "shmx",
    "iceoryx2": "iceoryx2",
    "iceoryx2_described": "iceoryx2",
    "vllm_arena": "vllm",
    "vllm_storage": "vllm",
    "pyshmem": "pyshmem",
    "sharedvector": "sharedvector",
    "sglang": "sglang",
    "segment": "torch",
    "torch_fs": "torch",
    "torch_fd": "torch",
    "pickle5": "numpy",
    "pickle": "torch",
    "ray": "ray",
}
ALL = tuple(PACKAGES)
# Only where named: Ray's daemons take time from whoever runs beside them; the other cannot be the fastest peer.
DEFAULT = tuple(name for name in ALL if name not in ("ray", "iceoryx2_described"))


def choose(asked: Sequence[str], default: Sequence[str] = DEFAULT) -> tuple[list[str], list[str]]:
    """Return the transports that can run, and a line for each that cannot.

    Parameters
    ----------
    asked
        Names; empty: those of `default`.

    Raises
    ------
    ValueError
        There is no such transport.
    """
    chosen, missing = [], []
    for name in dict.fromkeys(asked or default):
        if name not in PACKAGES:
            raise ValueError(f"no transport {name!r}; choose from {', '.join(ALL)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            missing.append(f"{name}: left out, the package {PACKAGES[name]} is not installed.")
        else:
            chosen.append(name)
    return chosen, missing


def load(name: str) -> ModuleType:
    """The module of a transport, with its ``Producer`` and ``Consumer``."""
    return importlib.import_module(f"{__package__}.{name}")
