"""`unwrap`: tensors of the caller's own, failure per request, nothing lost (rules 1, 2, 5, 8)."""

from __future__ import annotations

import pickle
import types

import numpy as np
import pytest
import torch

import shmx
from tests.blocks import messages
from tests.containers import Data
from tests.handle_bytes import parse
from tests.patterns import is_pattern, pattern


def held():
    return shmx.default_arena().stats()["held_blocks"]


def request(seed, rid=None):
    return Data(pattern(seed), (pattern(seed + 1),), rid=rid or f"r{seed}")


def is_request(one, seed):
    return is_pattern(one.first, seed) and is_pattern(one.second[0], seed + 1)


def lost(seed):
    """A request whose block is gone."""
    wrapped = shmx.wrap(request(seed))
    blob = pickle.dumps(wrapped)
    wrapped.first.revoke()
    return pickle.loads(blob)


def test_tensors_are_the_callers_own_and_nothing_is_held():
    wrapped = shmx.wrap(request(1))
    assert held() == 1
    unwrapped = shmx.unwrap(wrapped)
    assert held() == 0
    unwrapped.first.fill_(7)
    assert is_pattern(unwrapped.second[0], 2)


def test_unwrapping_twice_changes_nothing():
    unwrapped = shmx.unwrap(shmx.wrap(request(1)))
    first, second = unwrapped.first, unwrapped.second
    assert shmx.unwrap(unwrapped) is unwrapped
    assert unwrapped.first is first
    assert unwrapped.second is second
    assert shmx.unwrap(5) == 5


def test_a_handle_by_itself_is_an_object_too():
    assert is_pattern(shmx.unwrap(shmx.share(pattern(1))), 1)


def test_a_handle_that_somebody_else_has_goes_on_holding():
    handle = shmx.share(pattern(1))
    assert is_pattern(shmx.unwrap([handle])[0], 1)
    assert is_pattern(handle.view(), 1)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_device_is_where_tensors_go_and_arrays_stay_arrays(device):
    wrapped = shmx.wrap([pattern(1), np.arange(20_000)])
    tensor, array = shmx.unwrap(wrapped, device=device)
    assert tensor.device == torch.device("cpu")
    assert type(array) is np.ndarray


def test_a_device_that_is_not_there_loses_nothing():
    wrapped = shmx.wrap([pattern(1), pattern(2)])
    with pytest.raises(Exception, match=r"hpu|HPU|device|backend"):
        shmx.unwrap(wrapped, device="hpu")
    assert is_request(Data(*shmx.unwrap([wrapped[0], (wrapped[1],)])), 1)


# ---- failure


def test_rule_5_an_error_leaves_the_object_as_it_was():
    good, bad = shmx.wrap(request(1)), lost(3)
    both = [good, bad]
    for _ in range(2):
        with pytest.raises(shmx.StaleHandleError):
            shmx.unwrap(both)
        assert isinstance(good.first, shmx.SharedTensor)
        assert isinstance(bad.first, shmx.SharedTensor)
    assert is_request(shmx.unwrap(good), 1)


def test_errors_are_returned_for_each_request_of_a_list():
    requests = [shmx.wrap(request(1)), lost(3), shmx.wrap(request(5)), Data(1, 2)]
    same, errors = shmx.unwrap(requests, on_error="return")
    assert same is requests
    assert [type(error) for error in errors] == [type(None), shmx.StaleHandleError, type(None), type(None)]
    assert is_request(requests[0], 1)
    assert is_request(requests[2], 5)
    assert isinstance(requests[1].first, shmx.SharedTensor)
    assert requests[1].rid == "r3"


@pytest.mark.parametrize("sequence", [list, tuple])
def test_errors_are_returned_for_each_request_of_a_batch(sequence):
    batch = types.SimpleNamespace(batch=sequence([shmx.wrap(request(1)), lost(3)]), rids=["r1", "r3"])
    same, errors = shmx.unwrap(batch, on_error="return")
    assert same is batch
    assert type(batch.batch) is sequence
    assert errors[0] is None
    assert isinstance(errors[1], shmx.StaleHandleError)
    assert is_request(batch.batch[0], 1)


class NotReady:
    @property
    def batch(self):
        raise RuntimeError("not ready")


def test_an_object_whose_batch_raises_is_one_request():
    obj = NotReady()
    obj.tensor = shmx.share(pattern(1))
    assert shmx.unwrap(obj, on_error="return") == (obj, [None])
    assert is_pattern(obj.tensor, 1)


def test_what_belongs_to_no_request_of_a_batch_fails_all_of_them():
    batch = types.SimpleNamespace(batch=[shmx.wrap(request(1)), Data(1, 2)], common=lost(3).first)
    _, errors = shmx.unwrap(batch, on_error="return")
    assert [type(error) for error in errors] == [shmx.StaleHandleError] * 2
    batch = types.SimpleNamespace(batch=[shmx.wrap(request(1)), lost(3)], common=shmx.share(pattern(9)))
    _, errors = shmx.unwrap(batch, on_error="return")
    assert errors[0] is None
    assert is_pattern(batch.common, 9)


def test_a_list_of_features_fails_one_by_one():
    features = [shmx.share(pattern(1)), lost(3).first, shmx.share(pattern(5))]
    _, errors = shmx.unwrap(features, on_error="return")
    assert [error is None for error in errors] == [True, False, True]
    assert is_pattern(features[0], 1)
    assert is_pattern(features[2], 5)
    assert not features[1].is_available


def test_one_object_has_one_error():
    assert shmx.unwrap(shmx.wrap(request(1)), on_error="return")[1] == [None]
    _, (error,) = shmx.unwrap(lost(3), on_error="return")
    assert isinstance(error, shmx.StaleHandleError)
    assert shmx.unwrap({}, on_error="return") == ({}, [None])
    assert shmx.unwrap([], on_error="return") == ([], [])


def test_requests_that_share_a_tensor_share_it_afterwards():
    tensor, pair = pattern(1), (pattern(2), "label")
    requests = shmx.wrap([Data(tensor, pair), Data(tensor, pair), Data(tensor, pair)])
    shmx.unwrap(requests, on_error="return")
    assert requests[0].first is requests[1].first is requests[2].first
    assert requests[0].second is requests[1].second is requests[2].second
    assert is_pattern(requests[2].second[0], 2)


def test_a_request_that_fails_keeps_the_handles_that_it_shares_with_another():
    handle = shmx.share(pattern(1))
    good, bad = {"a": handle}, {"a": handle, "b": lost(3).first}
    for requests in ([good, bad], ([{"a": handle}], bad)):
        unwrapped, errors = shmx.unwrap(requests, on_error="return")
        assert [error is None for error in errors] == [True, False]
        assert not shmx.has_shared(unwrapped[0])
        assert bad["a"] is handle


def test_a_request_that_fails_half_way_keeps_all_its_handles(monkeypatch):
    requests = [shmx.wrap(request(1)), shmx.wrap([pattern(3), np.arange(20_000)])]
    with monkeypatch.context() as patch:
        patch.setattr(shmx.SharedArray, "materialize", lambda self, device=None: 1 / 0)
        _, errors = shmx.unwrap(requests, on_error="return")
    assert [type(error) for error in errors] == [type(None), ZeroDivisionError]
    assert is_request(requests[0], 1)
    assert isinstance(requests[1][0], shmx.SharedTensor)
    assert is_pattern(shmx.unwrap(requests)[1][0], 3)


def test_handles_of_another_host_say_so():
    fields = parse(shmx.share(pattern(1)).to_bytes(readers=0))
    fields.host ^= 1
    foreign = shmx.SharedTensor.from_bytes(fields.to_bytes())
    with pytest.raises(shmx.ForeignHostError, match="another host"):
        shmx.unwrap([foreign])
    _, (error,) = shmx.unwrap({"a": foreign}, on_error="return")
    assert isinstance(error, shmx.ForeignHostError)


def test_on_error_is_one_of_two_words():
    with pytest.raises(ValueError, match="'raise' or 'return', not 'ignore'"):
        shmx.unwrap([], on_error="ignore")


# ---- between processes


def serve(connection, blob):
    """A rank: loads, waits until the producer has gone, and unwraps."""
    loaded = pickle.loads(blob)
    connection.send("loaded")
    connection.recv()
    loaded, errors = shmx.unwrap(loaded, on_error="return")
    return [error is None and is_request(one, seed) for one, error, seed in zip(loaded, errors, (1, 5, 9), strict=True)]


def produce(connection, readers):
    requests = [*shmx.wrap([request(1), request(5)]), lost(9)]
    with shmx.readers(readers):
        connection.send(pickle.dumps(requests))


@pytest.mark.needs_names
def test_rule_2_every_rank_unwraps_after_the_producer_has_gone(children):
    producer = children.start(produce, 3)
    blob = producer.receive()
    producer.result()
    ranks = [children.start(serve, blob) for _ in range(3)]
    for rank in ranks:
        assert rank.receive() == "loaded"
    for rank in ranks:
        rank.send("go")
        assert rank.result() == [True, True, False]


def test_a_request_goes_on_from_rank_to_rank():
    first = shmx.wrap([request(1)])
    for _ in range(4):
        with shmx.readers(1):
            blob = pickle.dumps(first)
        first = pickle.loads(blob)
        assert messages() == 0
    assert is_request(shmx.unwrap(first)[0], 1)
