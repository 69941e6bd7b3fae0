"""Did anything get slower between two result files? ``python -m shmx.bench.compare BEFORE.json AFTER.json``.

Cells with the same question, table, row and column are compared by the ratio of their medians. A cell is better or
worse only if the ratio leaves the tolerance, and a bootstrap interval of the ratio lies wholly on that side of 1. The
interval knows the noise within each run, not what changed on the machine between them: the rows that are not judged,
which run the same code in both files, show that.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .report import Report, quantile, read

__all__ = ["Change", "changes", "main"]

# Units of which more is better.
RATES = ("1/s", "GB/s")
_RESAMPLES = 1000
_CONFIDENCE = 0.99
_FEWEST = 5


@dataclass(frozen=True)
class Change:
    """One cell of both files.

    Attributes
    ----------
    ratio
        Median after over median before, turned round for rates: above 1 is worse.
    low, high
        Ends of the bootstrap interval of `ratio`.
    verdict
        ``better``, ``worse``, ``noise``, or ``few`` where there are too few samples to say.
    """

    cell: tuple[str, str, str, str]
    ratio: float
    low: float
    high: float
    verdict: str


def changes(before: Sequence[Report], after: Sequence[Report], tolerance: float) -> list[Change]:
    """Compare all cells that both have.

    Parameters
    ----------
    tolerance
        0.1: a ratio of up to 1.1, and down to 1 / 1.1, is no change.
    """
    old, new = _cells(before), _cells(after)
    return [_change(cell, old[cell], new[cell], tolerance) for cell in old if cell in new]


def _cells(reports: Sequence[Report]) -> dict[tuple[str, str, str, str], tuple[str, list[float]]]:
    return {
        (report.question, table.title, row, column): (table.unit, samples)
        for report in reports
        for table in report.tables
        for row, cells in table.samples.items()
        for column, samples in cells.items()
        if samples
    }


def _change(
    cell: tuple[str, str, str, str],
    before: tuple[str, list[float]],
    after: tuple[str, list[float]],
    tolerance: float,
) -> Change:
    unit, old = before
    _, new = after
    if unit in RATES:
        old, new = new, old
    ratio = _ratio(old, new)
    if len(old) < _FEWEST or len(new) < _FEWEST:
        return Change(cell, ratio, ratio, ratio, "few")
    # Seeded: the same files always get the same verdict.
    chance = random.Random(0)
    ratios = [_ratio(chance.choices(old, k=len(old)), chance.choices(new, k=len(new))) for _ in range(_RESAMPLES)]
    low, high = quantile(ratios, (1 - _CONFIDENCE) / 2), quantile(ratios, (1 + _CONFIDENCE) / 2)
    verdict = "noise"
    if ratio > 1 + tolerance and low > 1:
        verdict = "worse"
    elif ratio < 1 / (1 + tolerance) and high < 1:
        verdict = "better"
    return Change(cell, ratio, low, high, verdict)


def _ratio(old: Sequence[float], new: Sequence[float]) -> float:
    before, after = statistics.median(old), statistics.median(new)
    if before == after:
        return 1.0
    return after / before if before else float("inf")


def main(argv: Sequence[str] | None = None) -> int:
    """Print what changed.

    Returns
    -------
    int
        0; 1 if a judged cell got worse; 2 if the files cannot be compared.
    """
    parser = argparse.ArgumentParser(prog="python -m shmx.bench.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="change that does not matter (default 0.1)")
    parser.add_argument("--rows", default="shmx", help="comma-separated rows to judge; all: every row (default shmx)")
    arguments = parser.parse_args(argv)
    try:
        found = changes(read(arguments.before), read(arguments.after), arguments.tolerance)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    rows = set(arguments.rows.split(","))
    judged = [change for change in found if "all" in rows or change.cell[2] in rows]
    if not judged:
        print(f"compare: the files have no cell of {arguments.rows} in common", file=sys.stderr)
        return 2
    for change in sorted(judged, key=lambda change: -change.ratio):
        question, title, row, column = change.cell
        print(
            f"{change.verdict:6}  {change.ratio:6.2f}x  [{change.low:.2f}, {change.high:.2f}]  "
            f"{question}: {title}: {row}, {column}"
        )
    others = [change.ratio for change in found if change not in judged]
    if others:
        print(f"rows that are not judged: {statistics.median(others):.2f}x (median of {len(others)} cells)")
    return int(any(change.verdict == "worse" for change in judged))


if __name__ == "__main__":
    sys.exit(main())
