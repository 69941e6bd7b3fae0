"""msgpack instead of pickle: the hooks of msgspec."""

from typing import Any

import msgspec
import torch

import shmx


class Request(msgspec.Struct):
    rid: str
    features: Any


encoder = msgspec.msgpack.Encoder(enc_hook=shmx.enc_hook)
decoder = msgspec.msgpack.Decoder(Request, ext_hook=shmx.ext_hook)
with shmx.readers(1):
    message = encoder.encode(Request("r1", [torch.rand(256, 1176), torch.arange(3)]))
received = shmx.unwrap(decoder.decode(message))
assert received.features[0].shape == (256, 1176)
