"""torch.multiprocessing, strategy ``file_system``: names of segments, a helper process that unlinks."""

from . import torch_shared
from .torch_shared import Consumer

__all__ = ["Consumer", "Producer"]


class Producer(torch_shared.Producer):
    """Passes names."""

    strategy = "file_system"
