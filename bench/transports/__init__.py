"""One module per transport, each with a ``Producer`` and a ``Consumer``; `registry` finds them by name."""
