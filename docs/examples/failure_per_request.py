"""One bad request of a batch: the healthy ones go on, and the bad one can still be answered."""

import pickle
from types import SimpleNamespace

import torch

import shmx

requests = [shmx.wrap(SimpleNamespace(rid=rid, pixels=torch.rand(128, 1176))) for rid in ("good", "aborted")]
message = pickle.dumps(requests)
requests[1].pixels.revoke()  # its client has gone away meanwhile
received, errors = shmx.unwrap(pickle.loads(message), on_error="return")
for request, error in zip(received, errors, strict=True):
    print(request.rid, "ready" if error is None else f"failed: {error}")
assert [error is None for error in errors] == [True, False]
