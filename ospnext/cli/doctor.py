"""`ospnext doctor`: what this machine can run, and why not more."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from typing import Any

HELP = """Say what this machine can run, and why not more: every backend with its device or every reason why it has
none, its kernels, the policy in force, and the optional packages. Exits with 1 if the policy asks for what cannot
run, or if PyTorch cannot be imported."""

OPTIONAL_PACKAGES = {"transformers": "t2v", "diffusers": "t2v", "sentencepiece": "t2v", "ftfy": "t2v", "av": "t2v"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    try:
        import torch  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # a package of a vendor's that PyTorch loads, or a library
        report = _examine_without_extensions(error)
        if isinstance(report, str):
            print(json.dumps({"torch_import": report}) if args.json else f"import torch fails here: {report}")
            return 1
    else:
        report = examine()
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 1 if report["policy"]["error"] or report.get("torch_import") else 0


def _examine_without_extensions(error: Exception) -> dict[str, Any] | str:
    """By a child that tells PyTorch to load no package of a vendor: an import that failed cannot be tried again in a
    process. Where PyTorch fails without them, too, one line that says how."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    code = "import json; from ospnext.cli.doctor import examine; print(json.dumps(examine()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        *_, last = ["no output", *done.stderr.strip().splitlines()]
        return f"{_first_line(error)}; with TORCH_DEVICE_BACKEND_AUTOLOAD=0: {last} (exit code {done.returncode})"
    sys.stderr.write(done.stderr)
    report = json.loads(done.stdout.splitlines()[-1])
    told = f"{str(error).partition('.')[0]}: {_first_line(error.__cause__)}" if error.__cause__ else _first_line(error)
    return {**report, "torch_import": told}


def _first_line(error: BaseException) -> str:
    """The first line of its text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def examine() -> dict[str, Any]:
    """The whole report as JSON types."""
    import torch

    from ospnext.ops.registry import registry
    from ospnext.version import __version__

    known = registry()
    return {
        "versions": {"ospnext": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "system": f"{platform.system()} {platform.machine()}",
        "policy": _policy(),
        "backends": [_backend(manifest, known) for manifest in known.ordered()],
        "failures": dict(known.failures),
        "optional_packages": {name: _version(name) for name in OPTIONAL_PACKAGES},
    }


def _policy() -> dict[str, Any]:
    from ospnext.errors import OSPNextError
    from ospnext.ops.device import default_device
    from ospnext.ops.policy import current_policy
    from ospnext.ops.registry import registry
    from ospnext.ops.select import auto_backend

    try:
        policy = current_policy()
    except OSPNextError as error:
        return {"text": None, "backend": None, "device": None, "error": str(error)}
    device = default_device()
    backend = auto_backend(device.type, registry()) if policy.backend == "auto" else policy.backend
    return {"text": str(policy), "backend": backend, "device": str(device), "error": None}


def _backend(manifest: Any, known: Any) -> dict[str, Any]:
    import dataclasses

    from ospnext.ops.contracts import CONTRACTS

    probe = known.probe(manifest.backend)
    return {
        "name": manifest.backend,
        "description": manifest.description,
        "available": probe.available,
        "reasons": [dataclasses.asdict(reason) for reason in probe.reasons],
        "needs": manifest.needs,
        "without_device": manifest.without_device,
        "device": dataclasses.asdict(probe.device) if probe.device else None,
        "kernels": {name: [_kernel(i, known) for i in manifest.offers(name)] for name in CONTRACTS},
        # Those made of other contracts run on these, so that they say nothing of their own.
        "composite": [
            name
            for name, contract in CONTRACTS.items()
            if contract.composite and not contract.composed_of and not manifest.offers(name)
        ],
    }


def _kernel(implementation: Any, known: Any) -> dict[str, Any]:
    missing = list(known.missing_packages(implementation))
    install = (implementation.install or f"pip install {' '.join(missing)}") if missing else ""
    return {"id": implementation.id, "note": implementation.note, "missing_packages": missing, "install": install}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    versions, policy = report["versions"], report["policy"]
    lines = [
        f"ospnext {versions['ospnext']}   Python {versions['python']}   torch {versions['torch']}   {report['system']}",
        f"policy   {policy['text']}" if policy["error"] is None else f"policy   cannot be followed: {policy['error']}",
    ]
    if report.get("torch_import"):
        lines.append(f"import torch fails here, and with it every other command: {report['torch_import']}")
        lines.append("    until that is mended, TORCH_DEVICE_BACKEND_AUTOLOAD=0 in the environment leaves it out")
    if policy["error"] is None:
        lines.append(f"in use   {policy['backend']} on {policy['device']}")
    for backend in report["backends"]:
        lines += ["", *_backend_lines(backend)]
    for name, trace in report["failures"].items():
        lines += ["", f"{name}: did not load: {trace.strip().splitlines()[-1]}   (--json has the whole traceback)"]
    return "\n".join([*lines, "", *_package_lines(report["optional_packages"])])


def _backend_lines(backend: dict[str, Any]) -> list[str]:
    state = "ready" if backend["available"] else "cannot run here"
    lines = [f"{backend['name']}: {state}   ({backend['description']})"]
    if backend["device"]:
        device = backend["device"]
        memory = f", {device['memory'] / 2**30:.1f} GiB" if device["memory"] else ""
        lines.append(f"    device     {device['name']}{memory}")
    lines += [f"    lacking    {r['code']}: {r['got']}; want {r['want']}" for r in backend["reasons"]]
    if not backend["available"]:
        rest = {"needs": backend["needs"], "without it": backend["without_device"]}
        return [*lines, *(f"    {name:<10} {text}" for name, text in rest.items() if text)]
    if not any(backend["kernels"].values()):
        return [*lines, "    kernels    none declared yet: nothing runs on it"]
    for contract, kernels in backend["kernels"].items():
        if kernels:
            lines.append(f"    {contract}: " + ", ".join(_kernel_words(k) for k in kernels))
    if backend["composite"]:
        lines.append(f"    plain PyTorch for: {', '.join(backend['composite'])}")
    return lines


def _kernel_words(kernel: dict[str, Any]) -> str:
    return kernel["id"] + (f" (needs {kernel['install']})" if kernel["install"] else "")


def _package_lines(packages: dict[str, str | None]) -> list[str]:
    found = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    missing = [name for name, version in packages.items() if not version]
    lines = [f"optional packages: {found or 'none'}"]
    if missing:
        extras = sorted({OPTIONAL_PACKAGES[name] for name in missing})
        lines.append(f"missing: {', '.join(missing)}   (pip install 'ospnext[{','.join(extras)}]')")
    return lines
