"""How the tests share a machine: as many workers as cores, one thread in each. Nothing that a test itself needs."""

from __future__ import annotations

import os

import pytest

#: Of workers and of all processes that tests start; a value that is already there stays.
ENVIRONMENT = {
    # Most tensors are small: threads that wait for each other take longer than one alone.
    "OMP_NUM_THREADS": "1",
    # The large ones come and go. glibc would hand their memory back each time, and the kernel clear it each time.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """For `-n auto`: cores that this process may use, of which pytest-xdist would count the physical ones alone."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
