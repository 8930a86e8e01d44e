"""The conformance suite. It is imported as `ospnext.conformance` and under no other name."""

if __name__ != "ospnext.conformance":
    # Two names would mean two copies of every test class and of the plugin.
    raise ImportError(
        f"import this folder as 'ospnext.conformance', not as {__name__!r}: install the project with `pip install -e .`"
    )
