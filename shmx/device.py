"""Materialize on a device other than the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from shmx._core import SharedTensor

__all__ = ["materialize"]


def materialize(
    handle: SharedTensor, device: torch.device | str | int, stream: Any = None, non_blocking: bool = True
) -> torch.Tensor:
    """Copy a shared tensor to ``device``; the copy has completed when this returns.

    Parameters
    ----------
    handle
        The shared tensor.
    device
        Anything that ``torch.device`` takes. ``"cpu"`` gives an owned tensor, as without a device.
    stream
        The device stream to copy on; the current stream by default.
    non_blocking
        Accepted for the signature's sake: shared pages that are not page-locked are copied synchronously.

    Returns
    -------
    torch.Tensor
        A tensor on ``device`` that the caller owns.
    """
    target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if target.type == "cpu":
        return handle.materialize()
    view = handle.view()
    if stream is None:
        return view.to(target)
    with stream:
        result = view.to(target)
        stream.synchronize()
    return result
