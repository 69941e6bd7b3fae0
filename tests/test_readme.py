"""The README is true: its quick start runs, its settings and errors exist."""

import re
from pathlib import Path

import pytest

import shmx
from shmx.config import ArenaConfig

README = Path(__file__).parent.parent / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="the tests run away from a checkout")


def test_the_quick_start_runs_as_written():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_every_setting_is_in_the_table():
    text = README.read_text()
    for name in ArenaConfig.__dataclass_fields__:
        assert f"`{name}`, `SHMX_{name.upper()}`" in text


def test_every_error_of_the_table_exists():
    for name in re.findall(r"^\| `(\w+Error)`", README.read_text(), re.MULTILINE):
        assert issubclass(getattr(shmx, name), shmx.ShmxError)
