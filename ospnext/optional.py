"""Optional packages: imported where they are needed, and named with the extra that brings them when they are
missing.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ospnext.errors import MissingDependencyError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise MissingDependencyError with the command that installs it.

    An ImportError raised *inside* an installed package is passed on unchanged: its cause is what the user needs to see.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingDependencyError(
            f"this needs the package {error.name!r}, which is not installed; try: pip install 'ospnext[{extra}]'",
            name=error.name,
        ) from error
