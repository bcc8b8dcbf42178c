"""``python -m cachegraph`` is the same as the command ``cachegraph``."""

from .cli import main

if __name__ == "__main__":
    main()
