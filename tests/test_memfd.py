"""Arenas of backend memfd: without a name, opened through the owner, freed by the kernel; and the choice of "auto"."""

from __future__ import annotations

import errno
import functools
import glob
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import shmx
from shmx.config import ArenaConfig
from tests.handle_bytes import parse
from tests.patterns import BLOCK, is_pattern, pattern
from tests.peer import control_file
from tests.peer import start_peer_fixture as start_peer_fixture

BOUND_S = 120
MIB = 1 << 20
REMEDY = "while the owner lives"


def small_arena(**settings) -> shmx.Arena:
    return shmx.Arena(**{"capacity": 16 * BLOCK, "segment_bytes": 4 * BLOCK, "backend": "memfd", **settings})


def dumps(handle: shmx.SharedTensor, readers: int = 1) -> bytes:
    with shmx.readers(readers):
        return pickle.dumps(handle)


def users_of(arena: str) -> set[int]:
    """The processes that have an arena without a name open or mapped."""
    mark = f"/memfd:{arena[1:]} (deleted)"
    found = set()
    for folder in glob.glob("/proc/[0-9]*"):
        with suppress(OSError):
            if f"/memfd:{arena[1:]} " in Path(folder, "maps").read_text():
                found.add(int(folder.removeprefix("/proc/")))
        for link in glob.glob(f"{folder}/fd/*"):
            with suppress(OSError):
                if os.readlink(link) == mark:
                    found.add(int(folder.removeprefix("/proc/")))
    return found


def in_namespaces(*command: str, options: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "--map-root-user", *options, *command],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )


@functools.cache
def refusal(*options: str) -> str | None:
    """Why there are no such namespaces to be had here."""
    if shutil.which("unshare") is None:
        return "unshare (util-linux) is not installed"
    tried = in_namespaces("true", options=options)
    return f"not here: {tried.stderr.strip()}" if tried.returncode != 0 else None


def needs_namespaces(*options: str) -> None:
    if (reason := refusal(*options)) is not None:
        pytest.skip(reason)


def run_scenario(name: str, *arguments: str, options: tuple[str, ...], mount: str | None = None) -> str:
    """Run a function of this module in namespaces of its own; answers what it has printed."""
    command = [sys.executable, "-m", "tests.test_memfd", name, *arguments]
    if mount is not None:
        command = ["sh", "-c", f'mount -t tmpfs -o {mount} tmpfs /dev/shm && exec "$@"', "sh", *command]
    ended = in_namespaces(*command, options=options)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# ---- what it is


def test_nothing_of_it_appears_in_dev_shm_and_the_statistics_name_the_backend(segments):
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        assert is_pattern(pickle.loads(dumps(handle)).view(), 1)
        assert not segments()
        assert (arena.backend, arena.stats()["backend"]) == ("memfd", "memfd")
        (membership,) = shmx.stats()["memberships"]
        assert membership["backend"] == "memfd"
        handle.release()
    assert users_of(arena.name) == set()


def test_the_default_is_shm_and_the_environment_or_configure_choose_another(monkeypatch):
    monkeypatch.delenv("SHMX_BACKEND", raising=False)
    with shmx.Arena(capacity=MIB) as arena:
        assert arena.backend == "shm"
    monkeypatch.setenv("SHMX_BACKEND", "memfd")
    with shmx.Arena(capacity=MIB) as arena:
        assert arena.backend == "memfd"
    with shmx.Arena(capacity=MIB, backend="shm") as arena:
        assert arena.backend == "shm"
    shmx.configure(backend="shm", capacity=MIB)
    try:
        shmx.share(torch.zeros(1))
        assert shmx.stats()["arena"]["backend"] == "shm"
    finally:
        shmx.arena._configured.clear()


def test_an_unknown_backend_is_refused_with_those_there_are(monkeypatch):
    with pytest.raises(ValueError, match=r"^backend='posix' is not a backend; give one of shm, memfd, auto"):
        shmx.Arena(backend="posix")
    monkeypatch.setenv("SHMX_BACKEND", "posix")
    with pytest.raises(ValueError, match="SHMX_BACKEND='posix' is not a backend; give one of shm, memfd, auto"):
        ArenaConfig.from_environment()


def test_a_handle_says_where_and_a_handle_of_an_arena_with_names_is_as_ever():
    with small_arena() as arena, shmx.Arena(capacity=MIB, backend="shm") as named:
        fields = parse(arena.share(pattern(1)).to_bytes(readers=0))
        assert fields.place is not None
        pid, descriptor = fields.place
        assert pid == os.getpid()
        assert os.readlink(f"/proc/{pid}/fd/{descriptor}") == f"/memfd:{arena.name[1:]} (deleted)"
        assert parse(named.share(pattern(1)).to_bytes(readers=0)).place is None


def test_a_pickle_of_8_dimensions_takes_at_most_256_bytes():
    with small_arena() as arena:
        strided = arena.empty((2,) * 8, dtype=torch.float64)[..., :1]
        handle = arena.share(strided)
        assert max(len(pickle.dumps(handle, protocol)) for protocol in range(2, 6)) <= 256
        for _ in range(4):
            assert pickle.loads(pickle.dumps(handle)).is_available
        del handle, strided
        shmx.gc(force=True)


def test_nobody_can_cut_it():
    """A third party that truncates an arena with names makes its users fault; here it cannot."""
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        path = control_file(arena.name)
        for cut in (lambda: os.truncate(path, 0), lambda: os.open(path, os.O_RDWR | os.O_TRUNC)):
            with pytest.raises(PermissionError) as raised:
                cut()
            assert raised.value.errno == errno.EPERM
        assert is_pattern(handle.view(), 1)
        handle.release()


def test_a_program_that_is_executed_inherits_nothing_of_it():
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        seen = subprocess.run(["sh", "-c", "ls -l /proc/self/fd"], capture_output=True, text=True, close_fds=False)
        assert seen.returncode == 0
        assert "memfd:shmx" not in seen.stdout
        handle.release()


# ---- its peers, and the end of its owner


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_processes_share_its_memory(start_peer, method):
    peer = start_peer(method)
    with small_arena() as arena:
        tensor = arena.empty((BLOCK // 8,), dtype=torch.int64)
        tensor.copy_(pattern(1))
        assert peer.load("a", dumps(arena.share(tensor))) is None
        peer.view("a")
        tensor.copy_(pattern(2))
        assert peer.check("a", 2)
        peer.drop("a")


def test_rule_1_an_attached_peer_reads_on_after_the_owner_was_killed_also_what_it_had_not_mapped(start_peer):
    owner, peer = start_peer(), start_peer()
    owner.configure(backend="memfd", capacity=16 * BLOCK, segment_bytes=BLOCK)
    for seed, key in enumerate("abc"):
        owner.share(key, seed)
    blobs = {key: owner.pickle(key, 1) for key in "abc"}
    assert peer.load("a", blobs["a"]) is None
    name = owner.arena()
    owner.kill()
    assert peer.check("a", 0)
    peer.drop("a")
    peer.gc()
    for seed, key in ((1, "b"), (2, "c")):
        assert peer.load(key, blobs[key]) is None
        assert peer.check(key, seed)
        peer.drop(key)
    peer.gc()
    assert peer.attached() == []
    assert users_of(name) == set()


def test_a_first_load_after_the_owner_s_end_is_lost_and_says_why(start_peer):
    """The exception to rule 2, of a pickle of the owner's and of one that an attached peer has forwarded."""
    owner, peer = start_peer(), start_peer()
    owner.configure(backend="memfd", capacity=16 * BLOCK)
    owner.share("a", 1)
    blob = owner.pickle("a", 2)
    assert peer.load("a", blob) is None
    forwarded = peer.pickle("a", 1)
    owner.kill()
    for late in (blob, forwarded, peer.pickle("a", 1)):
        handle = pickle.loads(late)
        assert type(handle.error) is shmx.SegmentLostError
        for part in (REMEDY, "closed its descriptors", "shmx.attach", "SHMX_BACKEND=shm"):
            assert part in str(handle.error)
    assert peer.check("a", 1)


def test_attach_is_enough_to_load_after_the_owner_s_end(start_peer):
    """The remedy that the error names."""
    owner = start_peer()
    owner.configure(backend="memfd", capacity=16 * BLOCK)
    owner.share("a", 1)
    shmx.attach(pickle.loads(owner.pickle("a", 1)))
    owner.share("b", 2)
    blob = owner.pickle("b", 1)
    owner.kill()
    assert is_pattern(pickle.loads(blob).view(), 2)


def test_rule_7_nothing_is_left_when_all_have_been_killed(start_peer):
    owner, peer = start_peer(), start_peer()
    owner.configure(backend="memfd", capacity=16 * BLOCK)
    owner.share("a", 1)
    assert peer.load("a", owner.pickle("a", 3)) is None
    name = owner.arena()
    assert users_of(name) == {owner.pid, peer.pid}
    owner.kill()
    assert users_of(name) == {peer.pid}
    peer.kill()
    assert users_of(name) == set()


def test_rule_10_a_forked_child_of_the_owner_reads_on(start_peer):
    owner = start_peer(spares=1)
    owner.configure(backend="memfd", capacity=16 * BLOCK)
    owner.share("a", 1)
    owner.view("a")
    name = owner.arena()
    child = owner.forked()
    owner.kill()
    assert child.check("a", 1)
    child.drop("a")
    child.gc()
    assert users_of(name) <= {child.pid}


def test_rule_2_a_message_of_a_closed_arena_is_loaded_while_its_process_lives(start_peer):
    peer = start_peer()
    with small_arena() as arena:
        blob = dumps(arena.share(pattern(1)), 2)
    assert pickle.loads(blob).is_available
    assert peer.load("a", blob) is None
    shmx.gc()
    assert peer.check("a", 1)
    peer.drop("a")
    shmx.gc()
    assert os.getpid() not in users_of(arena.name)


# ---- descriptors


def test_an_owner_whose_descriptors_were_closed_is_reached_by_its_peers_only(start_peer):
    """There is no way back to a file without a name: a daemonizer comes before the first share."""
    owner, peer, late = start_peer(), start_peer(), start_peer()
    owner.configure(backend="memfd", capacity=16 * BLOCK, segment_bytes=BLOCK)
    owner.share("a", 1)
    assert peer.load("a", owner.pickle("a", 1)) is None
    owner.close_descriptors()
    foreign = owner.intact_descriptors()
    assert peer.load("b", owner.pickle("a", 1)) is None
    assert peer.check("b", 1)
    assert late.load("a", owner.pickle("a", 1)) == "SegmentLostError"
    with pytest.raises(Exception, match=r"SegmentLostError.*closed its descriptors"):
        owner.share("b", 2)
    assert owner.check("a", 1)
    assert owner.intact_descriptors() == foreign


# ---- ls and gc


def test_it_is_listed_while_somebody_has_it_open_and_no_matter_for_gc(start_peer, capsys):
    from shmx.cli import main

    owner, peer = start_peer(), start_peer()
    owner.configure(backend="memfd", capacity=16 * BLOCK)
    owner.share("a", 1)
    name = owner.arena()
    assert peer.load("a", owner.pickle("a", 1)) is None
    (found,) = (one for one in shmx.arenas() if one["name"] == name)
    assert (found["backend"], found["state"], found["owner_pid"]) == ("memfd", "alive", owner.pid)
    assert {one["pid"] for one in found["peers"]} == {owner.pid, peer.pid}
    assert main(["ls"]) == 0
    assert f"{name} (memfd)  alive  pid {owner.pid}" in capsys.readouterr().out
    owner.kill()
    (found,) = (one for one in shmx.arenas() if one["name"] == name)
    assert found["state"] == "orphan"
    for dry_run in (True, False):
        assert name not in {one["name"] for one in shmx.gc(force=True, dry_run=dry_run)}
    assert peer.check("a", 1)
    peer.kill()
    assert name not in {one["name"] for one in shmx.arenas()}


# ---- auto


def test_auto_takes_names_where_dev_shm_has_room():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with shmx.Arena(backend="auto", capacity=MIB) as arena:
            assert arena.backend == "shm"


def test_auto_takes_memfd_on_a_small_dev_shm_and_warns_once():
    needs_namespaces("--mount")
    assert run_scenario("small_dev_shm", options=("--mount",), mount="size=16m") == "held\n"


def small_dev_shm() -> None:
    for settings in ({"capacity": 64 * MIB}, {}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with shmx.Arena(backend="auto", **settings) as arena:
                assert arena.backend == "memfd"
                assert arena.capacity > 16 * MIB
                handle = arena.share(torch.full((40 * MIB,), 7, dtype=torch.uint8))
                assert bool((handle.view() == 7).all())
                handle.release()
        texts = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
        if settings:
            (text,) = texts
            assert "/dev/shm is too small" in text
            assert "must load its first handle of it" in text
        else:
            assert texts == []
    with shmx.Arena(backend="auto", capacity=8 * MIB) as arena:
        assert arena.backend == "shm"
    print("held")


def test_memfd_needs_no_dev_shm_to_write_to():
    needs_namespaces("--mount")
    assert run_scenario("read_only_dev_shm", options=("--mount",), mount="ro,size=4k") == "held\n"


def read_only_dev_shm() -> None:
    with shmx.Arena(backend="memfd", capacity=64 * MIB) as arena:
        handle = arena.share(torch.arange(MIB))
        assert torch.equal(pickle.loads(dumps(handle)).view(), torch.arange(MIB))
        handle.release()
    print("held")


# ---- another PID namespace


def test_from_another_pid_namespace_it_is_foreign_and_the_error_says_what_to_do():
    options = ("--pid", "--fork", "--mount-proc")
    needs_namespaces(*options)
    with small_arena() as arena:
        handle = arena.share(pattern(1))
        told = run_scenario("another_pid_namespace", handle.to_bytes(readers=0).hex(), options=options)
        assert told.startswith("ForeignHostError ")
        assert "another PID namespace" in told
        assert "SHMX_BACKEND=shm" in told
        handle.release()


def another_pid_namespace(text: str) -> None:
    error = shmx.SharedTensor.from_bytes(bytes.fromhex(text)).error
    print(type(error).__name__, error)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
