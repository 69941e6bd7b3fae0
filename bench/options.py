"""What a user of ``shmx bench`` chooses, as every question receives it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Choices for one run. ``None`` or empty: the question's own default.

    Attributes
    ----------
    rounds
        Rounds that are kept, warm-up not counted.
    quick
        A few rounds at small sizes: shows that everything works, measures nothing.
    sizes
        What to move, as on the command line: ``4KiB``, ``16MiB``, ``mm32``; `payloads` parses it.
    transports
        Names of transports, in the order of the tables.
    consumers
        How many consumers; one table each.
    modes
        ``view``, ``own``: what `latency` measures.
    malloc
        How consumers allocate, see `malloc_policy`.
    """

    rounds: int | None = None
    quick: bool = False
    sizes: tuple[str, ...] = ()
    transports: tuple[str, ...] = ()
    consumers: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()
    malloc: str = "settled"

    def rounds_or(self, default: int, quick: int = 3) -> int:
        """Rounds asked for, else `quick` in a quick run, else `default`."""
        return self.rounds or (quick if self.quick else default)
