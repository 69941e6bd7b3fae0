"""What a benchmark has measured: samples in tables, marks that hold or not, and the machine; as text and as JSON.

A question (one module each, see `runner`) returns a `Report`. Samples are kept one by one, so that two runs can be
compared later (`compare`) and rows of one run can be paired: sample i of every row of a table was taken in round i.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import shmx

__all__ = ["Check", "Report", "Table", "machine", "paired_ratio", "quantile", "read", "size_text", "write"]

FORMAT = 1


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1) of the samples, interpolated linearly; NaN of none."""
    if not samples:
        return math.nan
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def paired_ratio(other: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the rounds of ``other / ours``: how many times longer the other took in the same round."""
    return statistics.median(b / a for a, b in zip(ours, other, strict=True)) if ours else math.nan


def size_text(size: float) -> str:
    """Bytes as people write them: ``4 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.4g} {unit}"
        size /= 1024
    raise AssertionError


@dataclass
class Table:
    """Samples of several rows (who was measured) under several columns (at which size, with how many ...).

    Attributes
    ----------
    title, unit
        What was measured, and its unit: ``us``, ``ms``, ``bytes``, ``count``, ``GB/s``.
    samples
        ``samples[row][column]`` lists one number per round, in the order of the rounds.
    baseline
        A row; the text shows the other rows' paired ratios to it.
    notes
        Sentences under the table.
    """

    title: str
    unit: str
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    baseline: str | None = None
    notes: list[str] = field(default_factory=list)

    def add(self, row: str, column: str, sample: float) -> None:
        """Append one round's sample."""
        self.samples.setdefault(row, {}).setdefault(column, []).append(sample)

    def columns(self) -> list[str]:
        """All columns, in the order of their first use."""
        return list(dict.fromkeys(column for row in self.samples.values() for column in row))

    def median(self, row: str, column: str) -> float:
        """Median of a cell; NaN if it has none."""
        return quantile(self.samples.get(row, {}).get(column, []), 0.5)

    def text(self) -> str:
        """The table as Markdown: median (p90), and the paired ratio to the baseline."""
        columns = self.columns()
        lines = [
            f"**{self.title}** ({self.unit}; median, p90" + (f", x {self.baseline})" if self.baseline else ")"),
            "",
            "| | " + " | ".join(columns) + " |",
            "|---|" + "---|" * len(columns),
        ]
        lines += [
            f"| {row} | " + " | ".join(self._cell(row, column) for column in columns) + " |" for row in self.samples
        ]
        return "\n".join([*lines, "", *self.notes])

    def _cell(self, row: str, column: str) -> str:
        samples = self.samples[row].get(column)
        if not samples:
            return "-"
        text = f"{_number(quantile(samples, 0.5))}"
        if len(samples) > 1:
            text += f" ({_number(quantile(samples, 0.9))})"
        base = self.samples.get(self.baseline or "", {}).get(column)
        if base and row != self.baseline and len(base) == len(samples) and all(base):
            text += f" {paired_ratio(samples, base):.2f}x"
        return text


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Check:
    """One mark: what was asked, the figure, and whether it holds."""

    mark: str
    value: float
    limit: str
    holds: bool


@dataclass
class Report:
    """What one question has found out."""

    question: str
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Tables, notes and marks as Markdown."""
        parts = [f"## {self.question}"] + [table.text() for table in self.tables] + self.notes
        if self.checks:
            rows = [
                f"| {c.mark} | {c.limit} | {_number(c.value)} | {'yes' if c.holds else 'NO'} |" for c in self.checks
            ]
            parts.append("\n".join(["| mark | asked | measured | holds |", "|---|---|---|---|", *rows]))
        return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def machine() -> dict[str, Any]:
    """What a reader has to know about where the figures come from."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shmx": shmx.__version__,
        "non_temporal_thresholds_bytes": shmx._core.non_temporal_thresholds(),
        "huge_pages": {name: _chosen(name) for name in ("enabled", "shmem_enabled")},
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _chosen(name: str) -> str:
    text = "".join(_lines(f"/sys/kernel/mm/transparent_hugepage/{name}"))
    return text.partition("[")[2].partition("]")[0]


def write(path: Path, reports: Sequence[Report], facts: Mapping[str, Any]) -> None:
    """Write reports as JSON; `facts` is what `machine` has returned."""
    document = {"format": FORMAT, "machine": dict(facts), "reports": [asdict(report) for report in reports]}
    path.write_text(json.dumps(document) + "\n")


def read(path: Path) -> list[Report]:
    """Read what `write` wrote; raises ``ValueError`` if it is something else."""
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file of `shmx bench --json` in format {FORMAT}; make it again")
    return [
        Report(
            **{
                **report,
                "tables": [Table(**table) for table in report["tables"]],
                "checks": [Check(**check) for check in report["checks"]],
            }
        )
        for report in document["reports"]
    ]
