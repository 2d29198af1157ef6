"""Where people already work: scikit-learn, Lightning, Hugging Face's Trainer, and the formats of serving.

Each module is a thin layer over :func:`debiased_laplace.fit` and :class:`debiased_laplace.Laplace`, and imports its
library when it is itself imported; nothing here is imported with the package (``docs/integrations.md``).
"""

from __future__ import annotations

import importlib
from typing import Any


def require(name: str, extra: str) -> Any:
    """A library that a module of this package is for.

    Args:
        name: Of the module to import.
        extra: The extra of this package that it comes with.

    Raises:
        ModuleNotFoundError: If it is not installed; it says what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise  # it is there, and lacks something itself
        raise ModuleNotFoundError(
            f"debiased_laplace.integrations needs {name}, not installed here: it comes with "
            f"pip install 'debiased-laplace[{extra}]'.",
            name=error.name,
        ) from error
