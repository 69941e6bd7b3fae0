"""The examples in docs/examples run as they stand, are short, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "docs" / "examples").glob("*.py"))


pytestmark = pytest.mark.skipif(not EXAMPLES, reason="the tests run away from a checkout")


def statements(source: str) -> list[str]:
    """Lines that are neither empty nor imports nor the docstring."""
    lines = [line for line in source.split('"""', 2)[2].splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(("import ", "from "))]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_as_it_stands(example):
    done = subprocess.run([sys.executable, "-W", "error", example], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short(example):
    assert len(statements(example.read_text())) <= 12


def test_there_are_some():
    assert len(EXAMPLES) >= 6
