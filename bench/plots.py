"""Draws tables whose columns are sizes or numbers: one line per row, both axes logarithmic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

from .payloads import parse
from .report import Report, Table, quantile

__all__ = ["draw"]


def draw(report: Report, folder: Path) -> list[Path]:
    """Write a PNG for every table that has at least two sizes, or two numbers, as columns; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for table in report.tables:
        places, meaning = _places(table)
        if len(places) > 1:
            slug = re.sub(r"[^a-z0-9]+", "-", f"{report.question} {table.title}".lower()).strip("-")
            files.append(_draw(table, places, meaning, folder / f"{slug}.png"))
    return files


def _places(table: Table) -> tuple[dict[str, int], str]:
    """Where on the axis the columns lie that name a size, or all if they are numbers; and what the axis means."""
    columns = table.columns()
    if all(column.isdecimal() and int(column) for column in columns):
        return {column: int(column) for column in columns}, "number"
    sizes = {}
    for column in columns:
        try:
            sizes[column] = parse(column.replace(" ", "")).nbytes
        except ValueError:
            continue
    return sizes, "bytes"


def _draw(table: Table, places: dict[str, int], meaning: str, file: Path) -> Path:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    ordered = sorted(places, key=places.__getitem__)
    for number, (row, cells) in enumerate(table.samples.items()):
        columns = [column for column in ordered if cells.get(column)]
        medians = [quantile(cells[column], 0.5) for column in columns]
        axes.plot([places[column] for column in columns], medians, label=row, **_style(row, number, table.baseline))
    axes.set(xscale="log", yscale="log", xlabel=meaning, ylabel=table.unit, title=table.title)
    axes.set_xticks([places[column] for column in ordered], ordered, rotation=45)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file


def _style(row: str, number: int, baseline: str | None) -> dict[str, Any]:
    if row == baseline:
        return {"color": "black", "linewidth": 2.5, "marker": "o"}
    # A bound, no contender.
    if row.startswith("("):
        return {"color": "gray", "linestyle": "dashed"}
    markers = "ovs^D"
    return {"color": f"C{number % 10}", "linewidth": 1.2, "marker": markers[number // 10 % len(markers)]}
