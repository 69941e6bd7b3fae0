"""How many instructions does a message cost in the core? A count does not depend on how busy the machine is.

The number is committed beside this file, for one major version of g++; with others it would differ without anybody
having changed anything. After a change that is meant to change it, or with a new compiler:
``SHMX_RECORD_INSTRUCTIONS=1 pytest tests/test_instructions.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMITTED = Path(__file__).with_name("instructions.json")
MESSAGES = 1000
TOLERANCE = 0.03


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240)


def compiler() -> tuple[str, str]:
    """Major version and full name of the g++ that CMake is told to use."""
    return run("g++", "-dumpversion").stdout.strip().partition(".")[0], run("g++", "--version").stdout.splitlines()[0]


@pytest.fixture(scope="module")
def message_cost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the sources of the core are not here; run this test from a checkout")
    for tool in ("g++", "cmake", "valgrind"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    build = tmp_path_factory.mktemp("build")
    options = ("-DSHMX_PYTHON=OFF", "-DSHMX_CPP_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_COMPILER=g++")
    configured = run("cmake", "-S", ROOT, "-B", build, *options)
    if "doctestConfig.cmake" in configured.stderr:
        pytest.skip("doctest is not installed, which the C++ tests are configured with")
    assert configured.returncode == 0, configured.stderr
    made = run("cmake", "--build", build, "--target", "message_cost", "--parallel", str(os.cpu_count()))
    assert made.returncode == 0, made.stdout + made.stderr
    return build / "tests" / "cpp" / "message_cost"


def instructions(program: Path, messages: int, folder: Path) -> int:
    counts = folder / f"callgrind.{messages}"
    done = run("valgrind", "--tool=callgrind", f"--callgrind-out-file={counts}", program, str(messages))
    assert done.returncode == 0, done.stderr
    found = re.search(r"^summary: (\d+)", counts.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_message_costs_as_many_instructions_as_committed(message_cost: Path, tmp_path: Path) -> None:
    once, twice = (instructions(message_cost, count * MESSAGES, tmp_path) for count in (1, 2))
    # What the program does at its start and end is in both.
    measured = (twice - once) / MESSAGES
    major, name = compiler()
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    if os.environ.get("SHMX_RECORD_INSTRUCTIONS") == "1":
        committed[major] = {"compiler": name, "instructions_per_message": round(measured)}
        COMMITTED.write_text(json.dumps(committed, indent=2, sort_keys=True) + "\n")
    if major not in committed:
        pytest.skip(f"no number is committed for g++ {major}; this one counts {measured:.0f} instructions per message")
    expected = committed[major]["instructions_per_message"]
    assert measured == pytest.approx(expected, rel=TOLERANCE), (
        f"{measured:.0f} instructions per message, {expected} are committed; if that is meant, record it "
        "(SHMX_RECORD_INSTRUCTIONS=1)"
    )
