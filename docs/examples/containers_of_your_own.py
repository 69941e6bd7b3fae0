"""A class that wrap does not look into, here an exception: tell how to take it apart, and how to make it again."""

import pickle

import torch

import shmx


class Rejected(ValueError):
    pass


shmx.register_container(Rejected, lambda error: (error.args, None), lambda args, _: Rejected(*args))
message = pickle.dumps(shmx.wrap(Rejected("too bright", torch.rand(256, 1176))))
reason, pixels = shmx.unwrap(pickle.loads(message)).args
assert reason == "too bright"
assert pixels.shape == (256, 1176)
