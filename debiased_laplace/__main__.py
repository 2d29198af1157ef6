"""The command `debiased-laplace`, also as ``python -m debiased_laplace``."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line, or say what to install where its libraries are missing."""
    try:
        import debiased_laplace.evaluation  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"Error: {error}")
    from debiased_laplace.cli import app

    try:
        app()
    except KeyboardInterrupt:  # before or after a command
        sys.exit(130)
    finally:
        gc.freeze()  # the process ends: looking through all its modules for cycles would take most of a second


if __name__ == "__main__":
    main()
