"""``python -m parrot`` is the command ``parrot``."""

from parrot.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
