"""The entry point of the command `autotune`: Ctrl-C is one line from the first moment on.

The command itself takes a tenth of a second to import, in which it can catch nothing.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command."""
    try:
        from tilewright.tuner import cli
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print("\nautotune: interrupted: nothing was begun", file=sys.stderr)
        sys.exit(130)
    cli.main()
