"""torch.multiprocessing, strategy ``file_descriptor``: consumers fetch descriptors from a thread of the producer."""

from . import torch_shared
from .torch_shared import Consumer

__all__ = ["Consumer", "Producer"]


class Producer(torch_shared.Producer):
    """Passes descriptors."""

    strategy = "file_descriptor"
