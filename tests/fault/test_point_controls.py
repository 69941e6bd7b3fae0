"""The checks at every point (tests/fault/points) catch a core in which a bug has been put back.

Each bug is one line of the core, changed in a copy that is built and checked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Bug:
    """`old` in the file `path` of the core becomes `new`; `program` then finds a violation in `operation`."""

    path: str
    old: str
    new: str
    program: str
    operation: str


BUGS = {
    "a release clears all holds for a moment": Bug(
        "attachment.cpp",
        "      clear_hold(entry.state, slot_);\n    }\n  }\n  // seq_cst",
        "      const std::uint64_t others = entry.state.holds.exchange(0) & ~hold_bit(slot_);\n"
        "      entry.state.holds.store(others);\n    }\n  }\n  // seq_cst",
        "kill_points",
        "release",
    ),
    "the control segment is removed first": Bug(
        "reaper.cpp",
        "  for (const NamedSegments& segments : list_arenas()) {\n    if (segments.arena != arena) continue;",
        "  unlink_segment(control);\n"
        "  for (const NamedSegments& segments : list_arenas()) {\n    if (segments.arena != arena) continue;",
        "kill_points",
        "removal of an orphan",
    ),
    "a reaper leaves a dead owner's holds": Bug(
        "reaper.cpp", "      control.clear_slot(kOwnerSlot);\n", "", "kill_points", "publish"
    ),
    "a sweep clears nothing": Bug("control.cpp", "      clear_slot(slot);\n", "", "kill_points", "load"),
    "a new arena's magic comes before its lock": Bug(
        "control.cpp",
        "    header.ttl_ticks = options.ttl_ticks;\n",
        "    header.ttl_ticks = options.ttl_ticks;\n    header.magic.store(~kMagic);\n",
        "kill_points",
        "creation",
    ),
    "a directory that cannot be read is an empty one": Bug(
        "segment.cpp",
        "      if (errno != 0) throw system_error",
        "      if (false) throw system_error",
        "failed_calls",
        "last release of an orphan",
    ),
    "a block is in one of the books only": Bug(
        "arena.cpp", "    blocks.erase(range.offset);\n    throw;", "    throw;", "failed_calls", "publish"
    ),
    "a slot stays locked where the kernel has no memory": Bug(
        "peer_lock.cpp", "kMostAttempts = 1000", "kMostAttempts = 1", "failed_calls", "sweep"
    ),
    "a failed creation leaves its name": Bug(
        "control.cpp", "    unlink_segment(name);\n    throw;", "    throw;", "failed_calls", "creation"
    ),
    "a message is announced that nobody gets": Bug(
        "handle.cpp",
        "    if (state.message) drop_message(block.state, *state.message);\n",
        "",
        "failed_calls",
        "pickle",
    ),
}


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the sources of the core are not here; run this test from a checkout")
    for tool in ("g++", "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("copy")
    for part in ("csrc", "tests"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    options = ("-DSHMX_PYTHON=OFF", "-DSHMX_CPP_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release")
    configured = run("cmake", "-S", folder, "-B", folder / "build", *options)
    if "doctestConfig.cmake" in configured.stderr:
        pytest.skip("doctest is not installed, which the C++ tests are configured with")
    assert configured.returncode == 0, configured.stderr
    return folder


def checked(copy: Path, program: str, operation: str) -> subprocess.CompletedProcess[str]:
    made = run("cmake", "--build", copy / "build", "--target", program, "--parallel", str(os.cpu_count()))
    assert made.returncode == 0, made.stdout + made.stderr
    return run(copy / "build" / "tests" / "fault" / "points" / program, operation)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_a_bug_that_is_put_back_is_caught(copy: Path, bug: Bug) -> None:
    path = copy / "csrc" / bug.path
    sound = path.read_text()
    assert sound.count(bug.old) == 1, "the core has changed; put the bug back in another way"
    try:
        path.write_text(sound.replace(bug.old, bug.new))
        found = checked(copy, bug.program, bug.operation)
    finally:
        path.write_text(sound)
    if found.returncode == 77:
        pytest.skip(found.stderr)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "VIOLATION" in found.stdout, found.stdout + found.stderr
