"""Metrics of this process in the text format of Prometheus, version 0.0.4."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from shmx import _core
from shmx.arena import inline_fallbacks

__all__ = ["CONTENT_TYPE", "metrics_text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Key of the counts, name, type, meaning.
_MEMBERSHIP = (
    ("loaded", "shmx_loaded_total", "counter", "Handles that this process has loaded."),
    ("stale_loads", "shmx_stale_loads_total", "counter", "Loads that came after the block was reused or revoked."),
    ("held_blocks", "shmx_held_blocks", "gauge", "Blocks that this process holds."),
    ("held_bytes", "shmx_held_bytes", "gauge", "Bytes of the blocks that this process holds."),
)
_OWNED = (
    ("published", "shmx_published_total", "counter", "Blocks that were handed out to a tensor."),
    ("reused", "shmx_reused_total", "counter", "Blocks that were handed out again at the same size."),
    ("revoked", "shmx_revoked_total", "counter", "Blocks whose handles were revoked."),
    ("expired_messages", "shmx_expired_messages_total", "counter", "Messages given up after their time-to-live."),
    ("dead_peers_swept", "shmx_dead_peers_swept_total", "counter", "Dead processes whose holds were taken back."),
    ("capacity", "shmx_capacity_bytes", "gauge", "Bytes that the arena may take from the system."),
    ("reserved_bytes", "shmx_reserved_bytes", "gauge", "Bytes that the arena has taken from the system."),
    ("peak_reserved_bytes", "shmx_reserved_peak_bytes", "gauge", "The most bytes it had taken at any time."),
    ("bytes_in_use", "shmx_in_use_bytes", "gauge", "Bytes of blocks that are held or may be loaded yet."),
    (
        "peak_block_bytes",
        "shmx_block_peak_bytes",
        "gauge",
        "The most bytes of all blocks at any time, be they in use or kept to be used again.",
    ),
    ("largest_free_bytes", "shmx_largest_free_bytes", "gauge", "The largest piece of reserved memory without a block."),
    ("segments", "shmx_segments", "gauge", "Data segments."),
    ("blocks", "shmx_blocks", "gauge", "Blocks, in use or kept to be used again."),
    ("messages", "shmx_messages", "gauge", "Messages with loads to come."),
    ("holders", "shmx_holders", "gauge", "Processes that hold a block."),
)


def metrics_text() -> str:
    """Write the counters of this process, for a scrape of Prometheus.

    Counters are of this process: loads of another one are in its own text. Every arena that this process takes part in
    is a label value; its series end when the process has left it.

    Returns
    -------
    str
        Lines to be served as ``shmx.metrics.CONTENT_TYPE``.
    """
    memberships = _core.membership_counts()
    owned = [membership["owned"] for membership in memberships if membership["owned"] is not None]
    lines: list[str] = []
    for key, name, kind, meaning in _MEMBERSHIP:
        lines += _family(name, kind, meaning, memberships, key)
    for key, name, kind, meaning in _OWNED:
        lines += _family(name, kind, meaning, owned, key)
    shm = os.statvfs("/dev/shm")
    for name, meaning, value in (
        ("shmx_pool_bytes", "Private memory kept for materialized tensors.", _core.pool_bytes()),
        ("shmx_dev_shm_size_bytes", "Size of the file system at /dev/shm.", shm.f_blocks * shm.f_frsize),
        ("shmx_dev_shm_free_bytes", "What it has left.", shm.f_bavail * shm.f_frsize),
    ):
        lines += [*_head(name, "gauge", meaning), f"{name} {value}"]
    name = "shmx_inline_fallbacks_total"
    meaning = "Tensors that travelled in the pickle because the arena was full."
    lines += [*_head(name, "counter", meaning), f"{name} {inline_fallbacks()}"]
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, meaning: str, samples: Iterable[dict[str, Any]], key: str) -> list[str]:
    lines = [f'{name}{{arena="{_label_value(sample["name"])}"}} {sample[key]}' for sample in samples]
    return [*_head(name, kind, meaning), *lines] if lines else []


def _head(name: str, kind: str, meaning: str) -> list[str]:
    escaped = meaning.replace("\\", r"\\").replace("\n", r"\n")
    return [f"# HELP {name} {escaped}", f"# TYPE {name} {kind}"]


def _label_value(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
