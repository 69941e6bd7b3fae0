"""Arenas of other user ids are never touched, unless producer and reader have both opted into one group.

Real processes with real user ids: it takes root to become another user.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import shmx
from shmx.config import ArenaConfig, apply_environment
from tests.children import Child, Children
from tests.patterns import is_pattern, pattern
from tests.peer import taken_slots

SHM = Path("/dev/shm")
PRODUCER, READER, GROUP, OTHER_GROUP = 65531, 65532, 54321, 54322

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root"),
    pytest.mark.needs_names,
]


def become(uid: int, groups: Sequence[int]) -> None:
    os.setgroups(groups)
    os.setgid(uid)
    os.setuid(uid)


def _produce(connection: Any, uid: int, groups: Sequence[int], group: int | None, readers: int) -> None:
    """Publish pattern(1) and pattern(2), the second in another data segment."""
    become(uid, groups)
    with shmx.Arena(capacity=1 << 20, segment_bytes=1 << 17, group=group) as arena:
        first = arena.share(pattern(1, 1 << 17))
        second = arena.share(pattern(2, 1 << 17))
        with shmx.readers(readers):
            blob = pickle.dumps([first, second])
        first.release()
        second.release()
        connection.send((arena.name, blob))
        connection.recv()


def _read(connection: Any, uid: int, groups: Sequence[int], trusted: int | None, blob: bytes) -> tuple[str, str]:
    """Class and text of the error of a load, or ``("", "")``; sends "loaded" and waits once it has loaded."""
    become(uid, groups)
    if trusted is not None:
        shmx.configure(group=trusted)
    handles = pickle.loads(blob)
    try:
        views = [handle.view() for handle in handles]
    except shmx.ShmxError as error:
        connection.send("refused")
        return type(error).__name__, str(error)
    connection.send("loaded")
    connection.recv()
    right = all(is_pattern(view, seed) for seed, view in enumerate(views, start=1))
    return ("", "") if right else ("other data", "")


def _collect(connection: Any, uid: int, groups: Sequence[int], trusted: int | None) -> list[dict[str, Any]]:
    become(uid, groups)
    if trusted is not None:
        shmx.configure(group=trusted)
    return shmx.gc(force=True)


def files_of(arena: str) -> list[Path]:
    return sorted(SHM.glob(arena.removeprefix("/") + "*"))


def content_of(arena: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files_of(arena)}


@pytest.fixture
def produce(children: Children):
    """Start a producer; its arena is removed in its user's name, whatever becomes of it."""
    producers = []

    def start(group: int | None, *, groups: Sequence[int] = (GROUP,), readers: int = 1) -> tuple[Child, str, bytes]:
        child = children.start(_produce, PRODUCER, groups, group, readers, method="fork")
        producers.append(child)
        return child, *child.receive()

    yield start
    for child in producers:
        child.kill()
    if producers:
        children.start(_collect, PRODUCER, (), None, method="fork").result()


def load(children: Children, blob: bytes, uid: int, groups: Sequence[int], trusted: int | None) -> tuple[str, str]:
    reader = children.start(_read, uid, groups, trusted, blob, method="fork")
    if reader.receive() == "loaded":
        reader.send("end")
    return reader.result()


def test_a_member_of_the_group_that_has_opted_in_reads_and_counts_as_a_peer(children, produce):
    _, arena, blob = produce(GROUP)
    assert len(files_of(arena)) == 3
    for path in files_of(arena):
        facts = path.stat()
        assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o777) == (PRODUCER, GROUP, 0o660)
    reader = children.start(_read, READER, (GROUP,), GROUP, blob, method="fork")
    assert reader.receive() == "loaded"
    assert taken_slots(arena) == [0, 1]
    reader.send("end")
    assert reader.result() == ("", "")
    assert taken_slots(arena) == [0]


def test_without_a_group_segments_are_private(produce):
    _, arena, _ = produce(None)
    for path in files_of(arena):
        facts = path.stat()
        assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o777) == (PRODUCER, PRODUCER, 0o600)


REFUSALS = {
    # Root could open any of them; what decides is the same for root.
    "the reader has not opted in": (GROUP, 0, (GROUP,), None),
    "the reader has opted into another group": (GROUP, 0, (GROUP, OTHER_GROUP), OTHER_GROUP),
    "the reader is not in the group": (GROUP, 0, (), GROUP),
    "the producer has not opted in": (None, 0, (PRODUCER,), PRODUCER),
    "another user, not opted in": (GROUP, READER, (GROUP,), None),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_arena_of_another_user_is_refused(children, produce, case):
    group, uid, groups, trusted = REFUSALS[case]
    _, arena, blob = produce(group)
    before = content_of(arena)
    error, text = load(children, blob, uid, groups, trusted)
    assert error == "InvalidHandleError"
    assert arena in text
    assert f"user id {PRODUCER}" in text
    assert "SHMX_GROUP" in text
    assert content_of(arena) == before
    assert taken_slots(arena) == [0]


@pytest.mark.parametrize(("group", "trusted"), [(None, None), (GROUP, GROUP)], ids=["private", "not a member"])
def test_what_the_kernel_refuses_is_a_system_call_error_with_the_remedy(children, produce, group, trusted):
    _, arena, blob = produce(group)
    error, text = load(children, blob, READER, (), trusted)
    assert error == "SystemCallError"
    assert arena in text
    assert "Permission denied" in text
    assert "SHMX_GROUP" in text


@pytest.mark.parametrize(("group", "trusted"), [(None, None), (GROUP, None), (GROUP, GROUP)])
def test_a_dead_producer_of_another_user_is_left_to_its_user(children, produce, group, trusted):
    """Also by root, by force, and in group mode: /dev/shm is sticky, so members could not remove the names."""
    child, arena, _ = produce(group)
    child.kill()
    before = content_of(arena)
    for uid in (0, READER):
        report = children.start(_collect, uid, (GROUP,), trusted, method="fork").result()
        assert [entry["outcome"] for entry in report if entry["name"] == arena] == ["not ours"]
        assert content_of(arena) == before
    report = children.start(_collect, PRODUCER, (), None, method="fork").result()
    assert [entry["outcome"] for entry in report if entry["name"] == arena] == ["removed"]
    assert not files_of(arena)


def test_a_reader_of_another_user_keeps_a_dead_producer_s_bytes_and_leaves_the_rest_to_its_user(children, produce):
    """Rules 1 and 7."""
    child, arena, blob = produce(GROUP, readers=2)
    reader = children.start(_read, READER, (GROUP,), GROUP, blob, method="fork")
    assert reader.receive() == "loaded"
    child.kill()
    assert load(children, blob, READER, (GROUP,), GROUP) == ("", "")
    report = children.start(_collect, PRODUCER, (), None, method="fork").result()
    assert [entry["outcome"] for entry in report if entry["name"] == arena] == ["in use"]
    reader.send("end")
    assert reader.result() == ("", "")
    report = children.start(_collect, PRODUCER, (), None, method="fork").result()
    assert [entry["outcome"] for entry in report if entry["name"] == arena] == ["removed"]


def _look(connection: Any, uid: int, groups: Sequence[int], trusted: int | None, name: str) -> tuple[str, str, str]:
    become(uid, groups)
    if trusted is not None:
        shmx.configure(group=trusted)
    (seen,) = [arena for arena in shmx.arenas() if arena["name"] == name]
    (told,) = [entry for entry in shmx.gc(dry_run=True) if entry["name"] == name]
    return seen["state"], told["outcome"], told["reason"]


def test_a_survey_shows_the_arenas_of_the_group_and_what_gc_would_not_do(children, produce):
    child, arena, _ = produce(GROUP)
    assert children.start(_look, READER, (GROUP,), None, arena, method="fork").result()[0] == "foreign"
    assert children.start(_look, READER, (GROUP,), GROUP, arena, method="fork").result()[0] == "alive"
    child.kill()
    state, outcome, reason = children.start(_look, READER, (GROUP,), GROUP, arena, method="fork").result()
    assert (state, outcome) == ("orphan", "not ours")
    assert f"user id {PRODUCER}" in reason


# ---- the setting


def test_a_group_that_the_process_is_not_in_is_a_value_error(segments):
    with pytest.raises(ValueError, match=rf"group {GROUP} is not one of this process's groups.*--group-add"):
        shmx.Arena(group=GROUP)
    assert not segments()


@pytest.mark.parametrize("group", ["no-such-group", "", "-1", -1, 1 << 32, (1 << 32) - 1])
def test_what_is_no_group_is_a_value_error_that_names_it(group, monkeypatch):
    for use in (shmx.Arena, shmx.configure):
        with pytest.raises(ValueError, match="group="):
            use(group=group)
    monkeypatch.setenv("SHMX_GROUP", str(group))
    for use in (shmx.Arena, apply_environment):
        with pytest.raises(ValueError, match="SHMX_GROUP="):
            use()


def _environment_decides(connection: Any, blob: bytes) -> tuple[str, str]:
    os.environ["SHMX_GROUP"] = str(GROUP)
    apply_environment()
    become(READER, (GROUP,))
    assert ArenaConfig.from_environment().group == GROUP
    handle = pickle.loads(blob)[0]
    with shmx.Arena(capacity=1 << 20) as arena:
        mode = (SHM / arena.name.removeprefix("/")).stat().st_mode & 0o777
    return type(handle.error).__name__, f"{mode:o}"


def test_the_environment_sets_it_for_producers_and_readers(children, produce):
    _, _, blob = produce(GROUP)
    assert children.start(_environment_decides, blob, method="fork").result() == ("NoneType", "660")


def test_a_group_may_be_given_by_name():
    with shmx.Arena(capacity=1 << 20, group="root") as arena:
        facts = files_of(arena.name)[0].stat()
    assert (facts.st_gid, facts.st_mode & 0o777) == (0, 0o660)
