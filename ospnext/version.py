"""The version, in a module of its own: next to a clone called `ospnext`, the package itself may be a bare namespace."""

__version__ = "0.1.0"
