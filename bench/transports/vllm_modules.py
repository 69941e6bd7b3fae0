"""The shared-memory modules of the installed vLLM, without its engine."""

from __future__ import annotations

import logging
from types import ModuleType, SimpleNamespace
from typing import Any

from .partial_import import import_only

__all__ = ["object_storage", "tensor_arena"]

_DEVICE = "vllm.distributed.device_communicators"
_MODULES = (
    f"{_DEVICE}.shm_broadcast",
    f"{_DEVICE}.shm_tensor_arena",
    f"{_DEVICE}.shm_object_storage",
    "vllm.v1.utils",
    "vllm.v1.serial_utils",
)
# The settings that the serializer asks for, with vLLM's defaults.
_SETTINGS = {"VLLM_ALLOW_INSECURE_SERIALIZATION": False, "VLLM_MSGPACK_ZERO_COPY_THRESHOLD": 256}
_VALUES: dict[str, dict[str, Any]] = {
    "vllm.envs": _SETTINGS,
    "vllm.logger": {"init_logger": logging.getLogger},
    "vllm.platforms": {"current_platform": SimpleNamespace(is_cuda_alike=lambda: False)},
    "vllm.utils.torch_utils": {"PIN_MEMORY": False},
}
_loaded: dict[str, ModuleType] = {}


def _module(name: str) -> ModuleType:
    if not _loaded:
        _loaded.update(zip(_MODULES, import_only("vllm", _MODULES, _VALUES), strict=True))
    return _loaded[name]


def tensor_arena() -> ModuleType:
    """Module of ``ShmTensorArena``."""
    return _module(f"{_DEVICE}.shm_tensor_arena")


def object_storage() -> ModuleType:
    """Module of ``SingleWriterShmObjectStorage``."""
    return _module(f"{_DEVICE}.shm_object_storage")
