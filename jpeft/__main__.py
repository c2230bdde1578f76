"""`python -m jpeft` is the `jpeft` command."""

from jpeft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
