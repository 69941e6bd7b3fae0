"""Each check of shmx doctor: what it says here, and that it fires where something is missing."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import shmx
from shmx import doctor
from shmx.config import ArenaConfig, environment_settings
from shmx.doctor import Finding
from tests.patterns import pattern

GIB = 1 << 30
ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "operations.md", ROOT / "docs" / "sglang.md"]


@pytest.mark.parametrize("check", doctor.CHECKS, ids=lambda check: check.__name__)
def test_a_check_answers_here_and_says_what_to_do_about_what_is_wrong(check):
    found = check()
    assert found.status in ("ok", "warn", "fail")
    assert found.finding
    assert found.status == "ok" or found.remedy


def test_a_machine_that_runs_these_tests_has_what_shmx_needs():
    assert [one for one in doctor.diagnose() if one.status == "fail"] == []


@pytest.mark.parametrize(
    ("release", "status"),
    [
        ("6.1.0-13-amd64", "ok"),
        ("5.14.0", "ok"),
        ("5.13.19", "warn"),
        ("4.4.0", "warn"),
        ("3.14.79", "fail"),
        ("2.6.32", "fail"),
        ("odd", "warn"),
    ],
)
def test_kernel(release, status):
    assert doctor.check_kernel(release).status == status


def test_a_shm_directory_that_is_absent_or_of_another_file_system(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"proc /proc proc rw 0 0\nnone {tmp_path} ext4 rw 0 0\n")
    assert doctor.check_shm_directory(str(tmp_path / "absent"), str(mounts)).status == "fail"
    other = doctor.check_shm_directory(str(tmp_path), str(mounts))
    assert (other.status, "ext4" in other.finding) == ("warn", True)
    mounts.write_text(f"none {tmp_path} ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\n")
    assert doctor.check_shm_directory(str(tmp_path), str(mounts)).status == "ok"
    mounts.write_text("proc /proc proc rw 0 0\n")
    assert doctor.check_shm_directory(str(tmp_path), str(mounts)).status == "warn"


def test_a_shm_directory_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert doctor.check_shm_directory(str(tmp_path)).status == "fail"


@pytest.mark.parametrize(
    ("size", "free", "capacity", "status"),
    [
        (16 * GIB, 16 * GIB, None, "ok"),
        (16 * GIB, 4 * GIB, None, "warn"),
        (16 * GIB, 4 * GIB, "2GiB", "ok"),
        (16 * GIB, 16 * GIB, "17GiB", "warn"),
        (64 << 20, 64 << 20, None, "warn"),
        (16 * GIB, 4096, None, "fail"),
        (16 * GIB, 16 * GIB, "much", "ok"),  # check_settings tells of it
    ],
)
def test_shm_size(size, free, capacity, status):
    environment = {} if capacity is None else {"SHMX_CAPACITY": capacity}
    assert doctor.check_shm_size(size, free, environment).status == status


@pytest.mark.parametrize(("size", "capacity"), [(12 * GIB, "13GiB"), (4 * GIB, "20GiB"), (64 << 20, "32MiB")])
def test_the_size_that_is_asked_for_is_larger_than_the_one_there_is_and_than_the_capacity(size, capacity):
    remedy = doctor.check_shm_size(size, size, {"SHMX_CAPACITY": capacity}).remedy
    (asked,) = re.findall(r"--shm-size=(\d+)g", remedy)
    assert int(asked) * GIB > size
    assert int(asked) * GIB >= ArenaConfig(capacity=capacity).given()["capacity"]


@pytest.mark.parametrize(
    ("total", "free", "status"), [(0, 0, "ok"), (10**6, 10**6, "ok"), (10**6, 10, "warn"), (10**6, 0, "fail")]
)
def test_shm_inodes(total, free, status):
    assert doctor.check_shm_inodes(total, free).status == status


@pytest.mark.parametrize(
    ("room", "status"), [(None, "ok"), (2**63 - 4096, "ok"), (16 * GIB, "ok"), (GIB, "warn"), (0, "warn")]
)
def test_memory_cgroup(room, status, monkeypatch):
    monkeypatch.delenv("SHMX_CAPACITY", raising=False)
    assert doctor.check_memory_cgroup(room, 16 * GIB).status == status


@pytest.mark.parametrize(
    ("enabled", "status"),
    [("always [madvise] never", "ok"), ("[always] madvise never", "ok"), ("always madvise [never]", "warn")],
)
def test_huge_pages(tmp_path, enabled, status):
    (tmp_path / "enabled").write_text(enabled)
    (tmp_path / "shmem_enabled").write_text("always within_size advise [never] deny force")
    found = doctor.check_huge_pages(str(tmp_path))
    assert (found.status, "shared memory: never" in found.finding) == (status, True)


def test_a_kernel_without_huge_pages(tmp_path):
    assert doctor.check_huge_pages(str(tmp_path)).status == "warn"


def test_memlock_is_told_and_asks_for_nothing():
    assert "no limit" in doctor.check_memlock(resource.RLIM_INFINITY).finding
    assert doctor.check_memlock(64 << 10) == Finding(
        "memlock", "ok", "64.0 KiB; drivers of devices lock pages without it"
    )


@pytest.mark.parametrize(("limit", "status"), [(resource.RLIM_INFINITY, "ok"), (1024, "ok"), (64, "warn")])
def test_open_files(limit, status):
    assert doctor.check_open_files(limit).status == status


def test_locks_where_no_file_can_be_made(tmp_path):
    assert doctor.check_locks(str(tmp_path / "absent")).status == "fail"


def test_locks_that_the_kernel_refuses(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(doctor.fcntl, "fcntl", refuse)
    found = doctor.check_locks()
    assert (found.status, "Invalid argument" in found.finding) == ("fail", True)


def test_locks_that_nobody_sees(monkeypatch):
    def nothing(_descriptor, _command, request):
        return doctor.struct.pack("@hhqqi4x", doctor.fcntl.F_UNLCK, 0, 0, 1, 0)

    monkeypatch.setattr(doctor.fcntl, "fcntl", nothing)
    assert doctor.check_locks().status == "fail"


def test_locks_leave_no_file():
    before = os.listdir("/dev/shm")
    assert doctor.check_locks().status == "ok"
    assert [name for name in os.listdir("/dev/shm") if "doctor" in name and name not in before] == []


def test_an_arena_that_cannot_be_made(monkeypatch):
    monkeypatch.setenv("SHMX_NUMA_NODE", "4095")
    found = doctor.check_arena()
    assert (found.status, "4095" in found.finding) == ("fail", True)


def test_an_arena_that_is_not_seen(monkeypatch):
    monkeypatch.setattr(doctor, "arenas", list)
    found = doctor.check_arena()
    assert (found.status, "not there" in found.finding) == ("fail", True)


@pytest.mark.parametrize(
    ("nodes", "refusal", "status"), [("0", None, "ok"), ("0", 1, "ok"), ("0-1", None, "ok"), ("0-1", 1, "warn")]
)
def test_numa(tmp_path, nodes, refusal, status):
    (tmp_path / "has_memory").write_text(nodes + "\n")
    assert doctor.check_numa(str(tmp_path), refusal).status == status


@pytest.mark.parametrize(
    ("program", "status", "part"),
    [
        ("print('[0, 12080, 2, 0]')", "ok", "CUDA 12.8, 2 devices; shared memory is page-locked"),
        ("print('[0, 12080, 1, 2]')", "warn", "1 device; it refuses to lock shared memory: code 2"),
        ("print('[0, 12080, 0, null]')", "warn", "0 devices"),
        ("print('[100, 12080, 0, null]')", "warn", "code 100"),
        ("import ctypes; ctypes.CDLL('libcuda.so.1.absent')", "ok", "no driver"),
        ("raise OSError('libcuda.so.1: file too short')", "warn", "too short"),
        ("import os; os.abort()", "warn", "status -6"),
        ("import time; time.sleep(60)", "warn", "did not answer"),
    ],
)
def test_cuda(program, status, part, monkeypatch):
    if "sleep" in program:
        monkeypatch.setattr(doctor, "_DRIVER_TIMEOUT_S", 1)
    found = doctor.check_cuda(program)
    assert (found.status, part in found.finding) == (status, True), found


def test_a_driver_that_locks_pages_is_told(fake_libraries, monkeypatch):
    monkeypatch.setenv("SHMX_CUDA_DRIVER", str(fake_libraries[0]))
    found = doctor.check_cuda(environment={"SHMX_PIN_BYTES": "1GiB"})
    assert found.status == "ok"
    assert found.finding.endswith(
        "CUDA 13.0, 2 devices; shared memory is page-locked for it, up to SHMX_PIN_BYTES=1GiB"
    )


def test_the_driver_is_not_loaded_into_this_process():
    code = "from shmx import doctor; doctor.check_cuda(); assert 'libcuda.so' not in open('/proc/self/maps').read()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_torch_without_the_exchange_interface(monkeypatch):
    monkeypatch.setattr(doctor, "torch", type("torch", (), {"__version__": "2.9", "Tensor": object}))
    assert doctor.check_torch().status == "fail"


@pytest.mark.needs_names
def test_leftovers_of_a_dead_process(children):
    child = children.start(leaves_an_arena)
    name = child.receive()
    assert doctor.check_leftovers().status in ("ok", "warn")
    child.kill()
    found = doctor.check_leftovers()
    assert (found.status, "shmx gc" in found.remedy) == ("warn", True)
    (report,) = (one for one in shmx.gc() if one["name"] == name)
    assert report["outcome"] == "removed"


def leaves_an_arena(connection):
    handle = shmx.share(pattern(1))
    connection.send(shmx.default_arena().name)
    connection.recv()
    return handle.nbytes


@pytest.mark.parametrize("state", ["damaged", "other version", "headless"])
def test_strange_leftovers_are_named(state):
    one = {"name": "/shmx-0", "backend": "shm", "state": state, "trouble": "t", "uid": 0, "memory_bytes": 1}
    one["attached"] = False
    found = doctor._judge_leftovers([one])
    assert (found.status, f"/shmx-0: {state}" in found.finding) == ("warn", True)


@pytest.mark.parametrize(
    ("environment", "status", "part"),
    [
        ({}, "ok", "defaults"),
        ({"SHMX_CAPACITY": "2GiB", "SHMX_READONLY": "1", "HOME": "/"}, "ok", "SHMX_CAPACITY=2GiB"),
        ({"SHMX_CAPACITY": "much", "SHMX_TICKET_TTL": "-1"}, "fail", "SHMX_CAPACITY='much'"),
        ({"SHMX_CAPACITY": "much", "SHMX_TICKET_TTL": "-1"}, "fail", "SHMX_TICKET_TTL='-1'"),
        ({"SHMX_POOL_BYTES": "lots", "SHMX_READONLY": "2"}, "fail", "SHMX_POOL_BYTES='lots'"),
        ({"SHMX_POOL_BYTES": "lots", "SHMX_READONLY": "2"}, "fail", "SHMX_READONLY='2'"),
        ({"SHMX_MIN_BYTES": "128KiB", "SHMX_SGLANG": "1"}, "ok", "SHMX_MIN_BYTES=128KiB, SHMX_SGLANG=1"),
        ({"SHMX_CAPACTIY": "2GiB"}, "warn", "SHMX_CAPACTIY"),
    ],
)
def test_settings(environment, status, part):
    found = doctor.check_settings(environment)
    assert (found.status, part in found.finding) == (status, True)


@pytest.mark.skipif(not DOCUMENTS[0].exists(), reason="the tests run away from a checkout")
def test_every_documented_setting_is_one():
    texts = [path.read_text() for path in DOCUMENTS]
    documented = {name for text in texts for name in re.findall(r"SHMX_[A-Z_]+", text)} - {"SHMX_LONG"}  # of the tests
    assert documented >= {"SHMX_CAPACITY", "SHMX_MIN_BYTES", "SHMX_SGLANG"}
    assert doctor.check_settings(dict.fromkeys(documented, "1MiB")).status == "fail"  # some are no sizes
    assert doctor.check_settings(dict.fromkeys(documented - environment_settings(), "1")).status == "ok"


@pytest.mark.parametrize("command", [["-m", "shmx"], [str(Path(sys.executable).with_name("shmx"))]])
def test_a_setting_that_the_import_refuses_is_a_finding_with_a_remedy(command):
    environment = os.environ | {"SHMX_POOL_BYTES": "lots"}
    started = [sys.executable, *command, "doctor"]
    done = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "")
    (line,) = (line for line in done.stdout.splitlines() if "SHMX_POOL_BYTES='lots' is not a size" in line)
    assert line.startswith("fail  settings")
    refused = subprocess.run([sys.executable, "-c", "import shmx"], env=environment, capture_output=True, timeout=120)
    assert refused.returncode == 1


def test_a_check_that_breaks_is_a_failure_and_the_others_answer():
    def check_of_nothing():
        raise KeyError("gone")

    broken, kernel = doctor.diagnose([check_of_nothing, doctor.check_kernel])
    assert (broken.status, broken.check, broken.finding) == ("fail", "of nothing", "KeyError: 'gone'")
    assert kernel.check == "kernel"
