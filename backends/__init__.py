"""The in-tree backends. They are imported as `ospnext.backends` and under no other name."""

if __name__ != "ospnext.backends":
    # Two names would mean two copies of every kernel, the second silently replacing the first.
    raise ImportError(
        f"import this folder as 'ospnext.backends', not as {__name__!r}: install the project with `pip install -e .`"
    )
