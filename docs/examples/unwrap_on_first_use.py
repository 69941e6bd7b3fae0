"""Nothing is copied until a tensor is used: a handle that is given to a torch function is the tensor there."""

import pickle

import torch

import shmx

message = pickle.dumps(shmx.wrap({"pixels": torch.ones(128, 1176), "unused": torch.ones(4096, 1176)}))
request = shmx.unwrap(pickle.loads(message), lazy=True)  # device="cuda" would put it there, when it is used
assert isinstance(request["pixels"], shmx.SharedTensor)
assert torch.sum(request["pixels"]) == 128 * 1176
