"""The `jpeft` command line: one file for each command, and `main`, which runs them."""

from jpeft.cli.main import main as main
