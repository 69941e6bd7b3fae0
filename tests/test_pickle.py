"""A handle pickles small, anywhere and any number of times (rules 4 and 5)."""

import pickle

import pytest
import torch

import shmx


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_handle_of_eight_dimensions_fits_in_256_bytes(protocol):
    handle = shmx.share(torch.zeros((1, 2, 3, 4, 5, 6, 7, 8)))
    with shmx.readers(1):
        blob = pickle.dumps(handle, protocol)
    assert len(blob) <= 256
    assert pickle.loads(blob).shape == (1, 2, 3, 4, 5, 6, 7, 8)
