"""One module per framework, each with ``install()`` and ``uninstall()``; none imports its framework before that."""

__all__: list[str] = []
