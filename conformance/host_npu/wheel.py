"""The torch_npu package: which release fits the torch of this interpreter, and where its files are.

Nothing here imports torch or torch_npu; the files are read, and copied into the cache without their own entry point."""

from __future__ import annotations

import compileall
import importlib.metadata
import importlib.util
import os
import platform
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ospnext.atomic import write_text
from ospnext.errors import ConfigError

from .whole import whole_folder

ENTRY_POINT = "[torch.backends]\nospnext_host_npu = ospnext.conformance.host_npu.autoload:activate\n"


class HostNpuUnavailableError(ConfigError):
    """This machine, Python or torch cannot have the host NPU: the message says why, and what to do."""


@dataclass(frozen=True)
class Release:
    """A release of torch_npu that was run on stub libraries.

    Attributes:
        hard_symbols: how many functions of CANN its libraries need when they are loaded.
        pythons: versions of Python that a wheel exists for.
        machines: processors that a wheel exists for.
    """

    version: str
    hard_symbols: int
    pythons: tuple[str, ...] = ("3.11", "3.12", "3.13", "3.14")
    machines: tuple[str, ...] = ("x86_64", "aarch64")


#: Version of torch -> its newest torch_npu. The first is developed with; docs/ascend_versions.md says what was run with
#: the others.
RELEASES: Mapping[str, Release] = MappingProxyType(
    {
        "2.13.0": Release("2.13.0", 84),
        "2.14.0": Release("2.14.0", 84),
        "2.12.0": Release("2.12.0.post3", 80),
        "2.11.0": Release("2.11.0.post3", 80),
    }
)


@dataclass(frozen=True)
class Package:
    """The unpacked package: `site` goes on the path of Python, `folder` is the torch_npu in it or elsewhere."""

    release: Release
    site: Path
    folder: Path


def torch_folder() -> Path:
    """Where torch is installed, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise HostNpuUnavailableError(f"the host NPU needs torch, which {sys.executable} does not have")
    return Path(spec.origin).parent


def release_for_torch() -> Release:
    """The release for the installed torch.

    Raises:
        HostNpuUnavailableError: there is none for this torch, this Python or this machine.
    """
    facts = runpy.run_path(str(torch_folder() / "version.py"))
    version = str(facts["__version__"])
    others = [f"{name} {facts[name]}" for name in ("cuda", "hip", "xpu") if facts.get(name)]
    known = ", ".join(RELEASES)
    if others:
        raise HostNpuUnavailableError(
            f"the host NPU needs a CPU build of torch, and {version} is built for {', '.join(others)}: torch_npu "
            f"refuses it. Make an environment with: pip install torch=={next(iter(RELEASES))} "
            "--index-url https://download.pytorch.org/whl/cpu"
        )
    release = RELEASES.get(version.split("+")[0])
    if release is None:
        raise HostNpuUnavailableError(
            f"the host NPU has no torch_npu for torch {version}; it was run with torch {known}"
        )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python not in release.pythons:
        raise HostNpuUnavailableError(
            f"torch_npu {release.version} has no wheel for Python {python}, but for {', '.join(release.pythons)}"
        )
    if sys.platform != "linux" or platform.machine() not in release.machines:
        raise HostNpuUnavailableError(
            f"torch_npu {release.version} has no wheel for {sys.platform} on {platform.machine()}, but for linux on "
            f"{' and '.join(release.machines)}"
        )
    return release


def cache_folder(release: Release) -> Path:
    """Where everything of a release is kept; holds nothing that cannot be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "ospnext" / "host_npu" / f"torch_npu-{release.version}-{_tag()}-{platform.machine()}"


def package(release: Release) -> Package:
    """The package of `release`: the installed one if there is one, else from the cache, else downloaded.

    Raises:
        HostNpuUnavailableError: it cannot be had; the message says what was tried and how to place the wheel by hand.
    """
    cache = cache_folder(release)
    site = cache / "site"
    installed = _installed(release, besides=site)
    if installed is not None:
        shadow = cache / "entry_point"
        whole_folder(shadow, lambda folder: _write_entry_point(folder, release))
        found = Package(release, shadow, installed)
    else:
        whole_folder(site, lambda folder: _unpack(_wheel(release, folder), release, folder))
        found = Package(release, site, site / "torch_npu")
    _write_entry_point(found.site, release)
    return found


def _tag() -> str:
    """Of wheels for this Python."""
    return f"cp{sys.version_info.major}{sys.version_info.minor}"


def _installed(release: Release, besides: Path) -> Path | None:
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None or Path(spec.origin).parent == besides / "torch_npu":
        return None
    found = importlib.metadata.version("torch_npu")
    if found != release.version:
        raise HostNpuUnavailableError(
            f"torch_npu {found} is installed in {Path(spec.origin).parent.parent}, and the host NPU was run with "
            f"{release.version}: install that one, or none, and it is downloaded"
        )
    return Path(spec.origin).parent


def _wheel(release: Release, scratch: Path) -> Path:
    """The wheel that lies in the cache, placed by hand, or a fresh download into `scratch`."""
    cache = cache_folder(release)
    placed = sorted(cache.glob(f"torch_npu-{release.version}-{_tag()}-*_{platform.machine()}.whl"))
    if placed:
        return placed[0]
    asked = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    asked.append(f"torch_npu=={release.version}")
    done = subprocess.run(asked, capture_output=True, text=True)
    wheels = sorted(scratch.glob("torch_npu-*.whl"))
    if done.returncode or not wheels:
        told = done.stderr.strip().splitlines() or ["no wheel and no message"]
        raise HostNpuUnavailableError(
            f"torch_npu {release.version} could not be downloaded (44 MB, once). Asked: {' '.join(asked)}. Answer: "
            f"{' ... '.join(dict.fromkeys((told[0], told[-1])))}. Without an index, get the file elsewhere and put "
            f"torch_npu-{release.version}-{_tag()}-{_tag()}-manylinux_2_28_{platform.machine()}.whl into {cache}"
        )
    return wheels[0]


def _unpack(wheel: Path, release: Release, folder: Path) -> None:
    """Everything but the wheel's own entry point, whose place ours takes."""
    own = f"torch_npu-{release.version}.dist-info/entry_points.txt"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name != own])
    if wheel.parent == folder:
        wheel.unlink()
    compileall.compile_dir(folder / "torch_npu", quiet=2)  # a second at every start where Python may not write


def _write_entry_point(folder: Path, release: Release) -> None:
    """Metadata of torch_npu that comes first on the path, so that the installed one's entry point is not seen."""
    info = folder / f"torch_npu-{release.version}.dist-info"
    info.mkdir(exist_ok=True)
    if not (info / "METADATA").exists():
        write_text(info / "METADATA", f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {release.version}\n")
    points = info / "entry_points.txt"
    if not points.exists() or points.read_text(encoding="utf-8") != ENTRY_POINT:  # an older ospnext may have written it
        write_text(points, ENTRY_POINT)
