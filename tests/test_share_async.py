"""Sharing from a coroutine: the event loop runs on, waiting takes no thread, and what is cancelled is not published."""

from __future__ import annotations

import asyncio
import pickle
import threading

import pytest
import torch

import shmx
from tests.patterns import BLOCK, is_pattern, pattern, small_arena

LARGE = 64 << 20


def test_a_small_and_a_large_tensor_are_published():
    async def publish():
        return await asyncio.gather(shmx.share_async(pattern(1)), shmx.share_async(pattern(2, LARGE), key="second"))

    small, large = asyncio.run(publish())
    with shmx.readers(1):
        blob = pickle.dumps([small, large])
    first, second = pickle.loads(blob)
    assert is_pattern(first.view(), 1)
    assert is_pattern(second.view(), 2)
    assert shmx.share(pattern(2, LARGE), key="second").view().data_ptr() == large.view().data_ptr()


def test_a_large_copy_is_not_made_by_the_thread_of_the_loop():
    """What the copying thread does is seen from a tensor subclass: a strided source is read through torch."""
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") == "detach":
                seen.append(threading.current_thread())
            return super().__torch_function__(function, types, args, kwargs or {})

    source = torch.arange(LARGE // 8).view(2, -1).t().as_subclass(Watched)
    handle = asyncio.run(shmx.share_async(source))
    assert torch.equal(handle.view(), source.as_subclass(torch.Tensor))
    assert seen
    assert threading.main_thread() not in seen


def test_the_loop_runs_on_while_the_arena_is_full():
    with small_arena(blocks=4) as arena:
        held = [arena.share(pattern(seed)) for seed in range(4)]

        async def wait_and_release():
            waiting = [asyncio.create_task(arena.share_async(pattern(10 + seed), timeout=60)) for seed in range(4)]
            # Each turn of the loop is a proof that nobody blocks it; more wait than there are threads to copy.
            for _ in range(100):
                await asyncio.sleep(0)
            assert not any(task.done() for task in waiting)
            while held:
                held.pop().release()
                await asyncio.sleep(0)
            return await asyncio.gather(*waiting)

        handles = asyncio.run(wait_and_release())
        assert all(is_pattern(handle.view(), 10 + seed) for seed, handle in enumerate(handles))


@pytest.mark.parametrize("timeout", [None, 0.0, 0.01])
def test_a_full_arena_is_an_error_when_the_time_is_over(timeout):
    with small_arena(blocks=2) as arena:
        held = [arena.share(pattern(seed)) for seed in range(2)]
        with pytest.raises(shmx.ArenaFullError):
            asyncio.run(arena.share_async(pattern(3), timeout=timeout))
        assert len(held) == 2


def test_what_can_never_fit_is_an_error_at_once():
    with small_arena(blocks=2) as arena, pytest.raises(shmx.ArenaFullError, match="capacity"):
        asyncio.run(arena.share_async(torch.zeros(3 * BLOCK, dtype=torch.uint8), timeout=3600))


def test_a_call_that_is_cancelled_holds_nothing():
    with small_arena(blocks=2) as arena:
        held = [arena.share(pattern(seed)) for seed in range(2)]

        async def give_up():
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(arena.share_async(pattern(3), timeout=3600), 0.05)

        asyncio.run(give_up())
        assert arena.stats()["held_blocks"] == len(held)


def test_bad_input_is_refused_as_by_share():
    with pytest.raises(TypeError, match=r"share takes a torch\.Tensor"):
        asyncio.run(shmx.share_async(None))
    with pytest.raises(TypeError, match="dense"):
        asyncio.run(shmx.share_async(torch.eye(3).to_sparse()))
    with pytest.raises(ValueError, match="not empty"):
        asyncio.run(shmx.share_async(torch.eye(3), key=""))


def share_in_a_loop(connection):
    handle = asyncio.run(shmx.share_async(pattern(1, LARGE)))
    with shmx.readers(1):
        return pickle.dumps(handle)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.needs_names
def test_a_child_process_shares_with_threads_of_its_own(children, method):
    kept = asyncio.run(shmx.share_async(pattern(2, LARGE)))  # the parent's threads exist by now
    handle = pickle.loads(children.start(share_in_a_loop, method=method).result())
    assert is_pattern(handle.view(), 1)
    assert is_pattern(kept.view(), 2)
