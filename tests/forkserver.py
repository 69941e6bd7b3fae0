"""A fork server that has imported what its children need, for tests that start many of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver


@contextmanager
def preloaded(*modules: str) -> Iterator[None]:
    """Children with the start method ``forkserver`` find these modules imported; no other server is left running."""
    # The server of earlier tests has other modules; a public way to end it does not exist.
    forkserver._forkserver._stop()
    multiprocessing.set_forkserver_preload(list(modules))
    try:
        yield
    finally:
        forkserver._forkserver._stop()
        multiprocessing.set_forkserver_preload(["__main__"])
