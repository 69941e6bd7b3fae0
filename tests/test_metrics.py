"""The counters of a process, and their text for Prometheus."""

from __future__ import annotations

import pickle
import re

import pytest

import shmx
from shmx import _core, metrics
from tests.patterns import BLOCK, pattern
from tests.peer import start_peer_fixture as start_peer_fixture

LINE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{arena="((?:[^"\\\n]|\\[\\"n])*)"\})? (-?[0-9.e+]+)')


def samples(text: str) -> dict[tuple[str, str | None], float]:
    """Read the text format, strictly: a family's HELP and TYPE come before its samples, and each family once."""
    assert text.endswith("\n")
    found: dict[tuple[str, str | None], float] = {}
    families: dict[str, str] = {}
    current = helped = None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            helped = line.split(" ")[2]
            assert helped not in families
        elif line.startswith("# TYPE "):
            _, _, current, kind = line.split(" ")
            assert current == helped
            assert kind in ("counter", "gauge")
            families[current] = kind
        else:
            match = LINE.fullmatch(line)
            assert match is not None, line
            name, arena, value = match.groups()
            assert name == current
            assert name.startswith("shmx_")
            assert name.endswith("_total") == (families[name] == "counter")
            assert (name, arena) not in found
            found[name, arena] = float(value)
    return found


def own(arena: shmx.Arena) -> dict:
    (membership,) = (one for one in shmx.stats()["memberships"] if one["name"] == arena.name)
    return membership


def test_without_an_arena_the_text_tells_of_the_process_alone():
    found = samples(shmx.metrics_text())
    process = {"shmx_pool_bytes", "shmx_dev_shm_size_bytes", "shmx_dev_shm_free_bytes", "shmx_inline_fallbacks_total"}
    assert {name for name, _ in found} == process


def test_the_owner_counts_what_it_publishes_loads_and_holds():
    with shmx.Arena(capacity=1 << 20) as arena:
        handle = arena.share(pattern(1))
        with shmx.readers(2):
            blob = pickle.dumps(handle)
        copies = [pickle.loads(blob) for _ in range(2)]
        found = samples(shmx.metrics_text())
        expected = {
            "shmx_published_total": 1,
            "shmx_loaded_total": 2,
            "shmx_stale_loads_total": 0,
            "shmx_held_blocks": 1,
            "shmx_held_bytes": BLOCK,
            "shmx_capacity_bytes": 1 << 20,
            "shmx_in_use_bytes": BLOCK,
            "shmx_messages": 0,
        }
        assert {name: found[name, arena.name] for name in expected} == expected
        assert found["shmx_reserved_bytes", arena.name] == arena.stats()["reserved_bytes"]
        for one in (handle, *copies):
            one.release()
        assert own(arena)["held_bytes"] == 0
        assert own(arena)["loaded"] == 2


def test_a_stale_load_is_counted():
    with shmx.Arena(capacity=1 << 20) as arena:
        handle = arena.share(pattern(1))
        blob = pickle.dumps(handle)
        handle.revoke()
        assert not pickle.loads(blob).is_available
        assert own(arena)["stale_loads"] == 1
        assert own(arena)["loaded"] == 0
        assert own(arena)["owned"]["revoked"] == 1


def test_a_dead_peer_and_an_expired_message_are_counted(start_peer):
    peer = start_peer()
    with shmx.Arena(capacity=1 << 20, ticket_ttl=0) as arena:
        handle = arena.share(pattern(1))
        peer.load("a", pickle.dumps(handle))
        pickle.dumps(handle)
        peer.kill()
        arena.sweep(expire_messages=True)
        found = samples(shmx.metrics_text())
        assert found["shmx_dead_peers_swept_total", arena.name] == 1
        assert found["shmx_expired_messages_total", arena.name] == 1
        handle.release()


def test_a_peer_counts_its_own_loads(start_peer):
    peer = start_peer()
    with shmx.Arena(capacity=1 << 20) as arena:
        handle = arena.share(pattern(1))
        with shmx.readers(2):
            blob = pickle.dumps(handle)
        peer.load("a", blob)
        peer.load("b", blob)
        (membership,) = peer.memberships()
        assert membership == {
            "name": arena.name,
            "backend": arena.backend,
            "loaded": 2,
            "stale_loads": 0,
            "held_blocks": 1,
            "held_bytes": BLOCK,
            "owned": None,
        }
        assert own(arena)["loaded"] == 0
        for key in ("a", "b"):
            peer.release(key)
        handle.release()


def test_peaks_stay_when_memory_is_given_back():
    with shmx.Arena(capacity=16 << 20, segment_bytes=4 << 20) as arena:
        handles = [arena.share(pattern(i, 1 << 20)) for i in range(6)]
        before = arena.stats()
        assert before["peak_block_bytes"] == 6 << 20
        assert before["peak_reserved_bytes"] >= before["reserved_bytes"] >= 6 << 20
        for handle in handles:
            handle.release()
        assert arena.trim() > 0
        after = arena.stats()
        assert after["reserved_bytes"] < before["reserved_bytes"]
        assert after["peak_reserved_bytes"] == before["peak_reserved_bytes"]
        assert after["peak_block_bytes"] == before["peak_block_bytes"]


def test_two_arenas_are_two_label_values_of_one_family():
    with shmx.Arena(capacity=1 << 20) as first, shmx.Arena(capacity=1 << 20) as second:
        found = samples(shmx.metrics_text())
        assert {arena for name, arena in found if name == "shmx_published_total"} == {first.name, second.name}


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", 'a\\n"\n'])
def test_label_values_are_escaped(text, monkeypatch):
    one = {"name": text, "loaded": 3, "stale_loads": 0, "held_blocks": 0, "held_bytes": 0, "owned": None}
    monkeypatch.setattr(_core, "membership_counts", lambda: [one])
    found = samples(shmx.metrics_text())
    (escaped,) = (arena for name, arena in found if name == "shmx_loaded_total")
    assert escaped is not None
    assert re.sub(r"\\(.)", lambda match: {"n": "\n"}.get(match[1], match[1]), escaped) == text


def test_help_texts_are_escaped():
    assert metrics._head("shmx_x", "gauge", "one\\\ntwo")[0] == r"# HELP shmx_x one\\\ntwo"


def test_the_content_type_names_the_format():
    assert metrics.CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
