"""The commands for operators: ls, gc and doctor, what they print and what their status is."""

from __future__ import annotations

import json
import os
import pickle

import pytest

import shmx
from shmx import cli, doctor
from shmx.doctor import Finding
from tests.patterns import BLOCK, pattern
from tests.peer import start_peer_fixture as start_peer_fixture


def leaves_an_arena(connection, readers):
    handle = shmx.share(pattern(1))
    with shmx.readers(readers):
        pickle.dumps(handle)
    connection.send(shmx.default_arena().name)
    connection.recv()


def printed(capsys, *arguments: str) -> list[str]:
    assert cli.main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out.splitlines()


def lines_of(lines: list[str], name: str) -> list[str]:
    """The line of an arena and the indented ones below it."""
    start = next(index for index, line in enumerate(lines) if line.startswith(name))
    end = start + 1
    while lines[end].startswith(" "):
        end += 1
    return lines[start:end]


def test_ls_tells_the_owner_the_peers_and_the_messages(capsys, start_peer):
    peer = start_peer()
    with shmx.Arena(capacity=1 << 20) as arena:
        handle = arena.share(pattern(1))
        with shmx.readers(3):
            blob = pickle.dumps(handle)
        peer.load("a", blob)
        peer.kill()
        head, use, messages, owner, dead = lines_of(printed(capsys, "ls"), arena.name)
        assert f"alive  pid {os.getpid()}" in head
        assert "of 1.0 MiB taken, 1 segment" in head
        assert use.strip() == "1 block in use, 64.0 KiB"
        assert messages.strip().startswith("1 message with 2 loads to come, the oldest for ")
        assert owner.strip() == f"owner  pid {os.getpid()}  alive  holds 1 block, 64.0 KiB"
        assert dead.strip() == f"slot 1  pid {peer.pid}  dead  holds 1 block, 64.0 KiB"
        shmx.discard(blob)
        handle.release()
        arena.sweep()


def test_ls_of_a_full_arena_says_that_all_of_it_is_taken_and_no_more(capsys):
    with shmx.Arena(capacity=1 << 20) as arena, arena.share(pattern(1, 1 << 20)):
        assert "  1.0 MiB of 1.0 MiB taken, " in lines_of(printed(capsys, "ls"), arena.name)[0]


def test_ls_as_json_is_what_arenas_returns(capsys):
    with shmx.Arena(capacity=1 << 20) as arena:
        handle = arena.share(pattern(1))
        found = {one["name"]: one for one in json.loads("\n".join(printed(capsys, "ls", "--json")))}
        (expected,) = (one for one in shmx.arenas() if one["name"] == arena.name)
        assert found[arena.name] == expected
        assert found[arena.name]["bytes_in_use"] == BLOCK
        handle.release()


@pytest.mark.needs_names
def test_ls_and_gc_of_an_orphan(capsys, children):
    child = children.start(leaves_an_arena, 2)
    name = child.receive()
    child.kill()
    assert f"orphan  pid {child.pid} has died" in lines_of(printed(capsys, "ls"), name)[0]

    (kept,) = (line for line in printed(capsys, "gc", "--dry-run") if line.startswith(name))
    assert "  in use  " in kept
    assert "1 message not loaded yet" in kept
    would = printed(capsys, "gc", "--dry-run", "--force")
    assert any(line.startswith(f"{name}  would be removed  ") and "has died" in line for line in would)
    assert would[-1] == f"{sum('would be removed' in line for line in would[:-1])} would be removed of {len(would) - 1}"
    assert lines_of(printed(capsys, "ls"), name)
    removed = printed(capsys, "gc", "--force")
    assert any(line.startswith(f"{name}  removed  ") and "1 message given up" in line for line in removed)
    assert not any(line.startswith(name) for line in printed(capsys, "ls"))


@pytest.mark.needs_names
def test_ls_points_to_gc_when_there_is_something_to_remove(capsys, children):
    child = children.start(leaves_an_arena, 0)
    name = child.receive()
    child.kill()
    assert "can be removed: shmx gc" in printed(capsys, "ls")[-1]
    (report,) = (one for one in shmx.gc() if one["name"] == name)
    assert report["outcome"] == "removed"


def test_doctor_as_json_and_as_text_say_the_same(capsys):
    text = printed(capsys, "doctor")
    report = json.loads("\n".join(printed(capsys, "doctor", "--json")))
    assert len(report) == len(doctor.CHECKS)
    assert {tuple(one) for one in report} == {("check", "status", "finding", "remedy")}
    heads = [line.split(maxsplit=1) for line in text if not line.startswith(" ")]
    assert [head[0] for head in heads] == [one["status"] for one in report]
    for head, one in zip(heads, report, strict=True):
        assert head[1].startswith(one["check"])


@pytest.mark.parametrize(("worst", "status"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_status_of_doctor_is_1_for_a_failure_only(worst, status, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda: [Finding("a", "ok", "fine"), Finding("b", worst, "so", "do this")])
    assert cli.main(["doctor"]) == status
    assert "-> do this" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == status
    assert json.loads(capsys.readouterr().out)[1]["remedy"] == "do this"


@pytest.mark.parametrize("command", ["doctor", "gc", "ls"])
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: shmx {command}" in capsys.readouterr().out
