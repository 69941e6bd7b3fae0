"""A handle that is given to a torch function is the tensor there; until then nothing is copied."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import shmx
from tests.blocks import messages
from tests.containers import Data, Items, Named
from tests.patterns import is_pattern, pattern


def held():
    return shmx.default_arena().stats()["held_blocks"]


def test_torch_functions_take_handles():
    tensor = torch.rand(100, 200)
    handle = shmx.share(tensor)
    assert torch.equal(torch.add(handle, 1), tensor + 1)
    assert torch.equal(torch.nn.functional.linear(torch.ones(3, 200), handle), torch.ones(3, 200) @ tensor.t())
    assert torch.equal(tensor + handle, tensor * 2)
    assert torch.equal(tensor.clone().copy_(handle), tensor)
    assert torch.equal(torch.cat([handle, tensor, handle]), torch.cat([tensor] * 3))
    assert torch.equal(torch.stack((handle, tensor)), torch.stack([tensor] * 2))
    assert torch.equal(torch.where(tensor > 0.5, input=handle, other=0.0), torch.where(tensor > 0.5, tensor, 0.0))
    assert torch.equal(torch.nn.Linear(200, 5)(handle).isfinite(), torch.ones(100, 5, dtype=torch.bool))


def test_torch_functions_take_handles_in_subclasses_of_list_and_tuple():
    tensor = torch.rand(100, 200)
    handle = shmx.share(tensor)
    for handles in (Named(handle, handle), Items([handle, handle])):
        assert torch.equal(torch.cat(handles), torch.cat([tensor] * 2))


def test_it_is_copied_once_and_belongs_to_the_handle():
    handle = shmx.share(pattern(1))
    first, second = torch.ravel(handle), torch.ravel(handle)
    assert first.data_ptr() == second.data_ptr() != handle.view().data_ptr()
    first.zero_()
    assert is_pattern(handle.view(), 1)


def test_the_copy_goes_with_the_handle_and_the_hold_until_then_stays():
    handle = shmx.share(pattern(1))
    own = torch.ravel(handle)
    assert held() == 1
    del handle
    assert held() == 0
    assert is_pattern(own, 1)


def test_a_lost_handle_raises_its_reason_where_it_is_used():
    handle = shmx.share(pattern(1))
    handle.release()
    with pytest.raises(shmx.ReleasedError):
        torch.add(handle, 1)


def test_lazy_unwrap_leaves_handles_that_hold_their_data():
    request = pickle.loads(pickle.dumps(shmx.wrap(Data(pattern(1), (pattern(2), np.arange(20_000))))))
    assert messages() == 0
    unwrapped = shmx.unwrap(request, lazy=True)
    assert unwrapped is request
    assert isinstance(request.first, shmx.SharedTensor)
    assert held() == 1
    assert is_pattern(torch.ravel(request.first), 1)
    assert is_pattern(torch.ravel(request.second[0]), 2)
    assert np.array_equal(np.add(request.second[1], 1), np.arange(20_000) + 1)
    # It can still travel on, or be unwrapped.
    again = pickle.loads(pickle.dumps(request))
    assert is_pattern(shmx.unwrap(again).first, 1)
    assert is_pattern(shmx.unwrap(request).first, 1)


def test_lazy_unwrap_remembers_the_device():
    request = shmx.unwrap(shmx.wrap([pattern(1)]), lazy=True, device="cpu")
    assert torch.ravel(request[0]).device.type == "cpu"
    elsewhere = shmx.unwrap(shmx.wrap([pattern(1)]), lazy=True, device="hpu")
    with pytest.raises(Exception, match=r"hpu|HPU|device|backend"):
        torch.ravel(elsewhere[0])


def test_lazy_unwrap_tells_at_once_of_data_that_is_gone():
    request = shmx.wrap([pattern(1)])
    request[0].release()
    with pytest.raises(shmx.ReleasedError):
        shmx.unwrap(request, lazy=True)
    assert isinstance(shmx.unwrap(request, lazy=True, on_error="return")[1][0], shmx.ReleasedError)
