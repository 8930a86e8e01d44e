"""Runs every check_* function of the files next to this one, in one process on the host NPU, and prints a JSON object:
what went wrong, by name. `test_host_npu_device.py` starts it."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

results = {}
for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    for name, check in list(vars(importlib.import_module(file.stem)).items()):
        if name.startswith("check_"):
            try:
                check()
                results[f"{file.stem}.{name}"] = ""
            except Exception:
                results[f"{file.stem}.{name}"] = traceback.format_exc()
json.dump(results, sys.stdout)
