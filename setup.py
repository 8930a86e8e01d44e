"""Lists every package of the three mapped folders; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {"ospnext": "ospnext", "ospnext.backends": "backends", "ospnext.conformance": "conformance"}
setup(
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in [package, *(f"{package}.{sub}" for sub in find_packages(folder))]
    ]
)
