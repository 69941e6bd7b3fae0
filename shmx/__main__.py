"""``python -m shmx`` is the ``shmx`` command."""

import sys

from shmx.cli import main

if __name__ == "__main__":
    sys.exit(main())
