"""The `jpeft` command line: one file for each command, and `main`, which runs them."""

import sys
from collections.abc import Sequence

from jpeft.extras import how_to_install

try:
    from jpeft.cli.main import main as main
except ImportError as error:
    _missing = how_to_install(error)
    if _missing is None:
        raise

    def main(argv: Sequence[str] | None = None) -> int:
        """Say what to install: the command line needs more than the core of jpeft."""
        del argv
        print(f"error: {_missing}", file=sys.stderr)
        return 2
