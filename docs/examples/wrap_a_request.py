"""A request of any shape: one call before it is sent, one call on each rank that receives it."""

import pickle
from dataclasses import dataclass

import torch

import shmx


@dataclass
class Request:
    rid: str
    features: list[torch.Tensor]


request = Request("r1", [torch.rand(256, 1176) for _ in range(3)])
message = pickle.dumps(shmx.wrap(request, readers=2))  # a few hundred bytes, for any transport
for _ in range(2):  # in any process of this host, in any order, however late
    received = shmx.unwrap(pickle.loads(message))
    assert received.features[2].shape == (256, 1176)
