"""Stub CANN libraries: made from what the libraries of an installed torch_npu are linked with, so that they load.

Functions with a meaning on host memory are written in data/host_npu.c; every other one fails when it is called, and
operators (`aclnn*`) are absent, so that one which is not emulated fails as well."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from ospnext.errors import ConfigError

from . import elf
from .wheel import HostNpuUnavailableError, Package, cache_folder, torch_folder
from .whole import whole_folder

BODIES = Path(__file__).parents[1] / "data" / "host_npu.c"

#: Libraries of CANN that torch_npu is linked with. All functions are in the first; the others are linked with it.
LIBRARIES = (
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
    "libge_runner.so",
    "libgraph.so",
    "libhccl.so",
)

#: Names of functions in that file.
WRITTEN = re.compile(r"^(?:(?:NOTHING|NO_OBJECT)|\w[\w ]*[ *](?=\w+\())\(?(\w+)[()]", re.MULTILINE)

#: What a function returns that has no body here: CANN's code for a feature that is not supported.
NOT_SUPPORTED = 207000


#: For dlinfo: the loader's entry of a library.
_RTLD_DI_LINKMAP = 2


class _LinkMap(ctypes.Structure):
    """The head of glibc's `struct link_map`."""

    _fields_ = (("address", ctypes.c_size_t), ("name", ctypes.c_char_p))


def stub_libraries(package: Package) -> Path:
    """The folder of the libraries for `package`, made unless the cache has them from this very generator.

    Raises:
        HostNpuUnavailableError: no C compiler, or a library of the system is missing.
        ConfigError: the package asks for other things than the build that was tried.
    """
    folder = cache_folder(package.release) / f"stubs-{_fingerprint(package)}"
    whole_folder(folder, lambda scratch: _build(hard_symbols(package), scratch))
    return folder


def _fingerprint(package: Package) -> str:
    """Changes when the package or what makes the libraries does."""
    library = package.folder / "lib" / "libtorch_npu.so"
    parts = [BODIES.read_bytes(), Path(__file__).read_bytes(), Path(elf.__file__).read_bytes()]
    parts.append(f"{library} {library.stat().st_size}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def hard_symbols(package: Package) -> set[str]:
    """Functions of CANN without which the libraries of `package` cannot be loaded."""
    own = {path.name: elf.read(path) for path in _libraries(package)}
    defined = {name for library in own.values() for name in library.defined}
    for name in sorted({n for library in own.values() for n in library.needed} - own.keys() - {*LIBRARIES}):
        defined |= elf.read(_loaded(name)).defined
    for path in (torch_folder() / "lib").glob("*.so*"):
        defined |= elf.read(path).defined
    undefined = {name for library in own.values() for name in library.undefined}
    hard = {name for name in undefined - defined if not name.startswith(("Py", "_Py"))}
    _check(hard, package)
    return hard


def _check(hard: set[str], package: Package) -> None:
    """Anything but the plain C functions that were counted means that the stubs no longer mean what they say."""
    release = package.release
    mangled = sorted(name for name in hard if name.startswith("_Z"))
    if mangled or len(hard) != release.hard_symbols:
        raise ConfigError(
            f"{package.folder} asks CANN for {len(hard)} functions, {len(mangled)} of them C++ {mangled[:3]}; the "
            f"torch_npu {release.version} that the host NPU was written for asks for {release.hard_symbols} and no "
            "C++: this is another build, and data/host_npu.c has to be read against it"
        )


def _libraries(package: Package) -> list[Path]:
    """The libraries that are loaded by `import torch_npu`; the one for ATB is loaded by what needs it."""
    return [
        path
        for path in sorted([*package.folder.glob("lib/*.so"), *package.folder.glob("_C*.so")])
        if "atb" not in path.name
    ]


def _loaded(name: str) -> Path:
    """The file of a library of the system or of torch, as the loader finds it."""
    inside = torch_folder() / "lib" / name
    if inside.exists():
        return inside
    try:
        handle = ctypes.CDLL(name)._handle
    except OSError as error:
        raise HostNpuUnavailableError(f"torch_npu needs {name}, which is not CANN's and not found: {error}") from None
    entry = ctypes.POINTER(_LinkMap)()
    ctypes.CDLL(None).dlinfo(ctypes.c_void_p(handle), _RTLD_DI_LINKMAP, ctypes.byref(entry))
    return Path(os.fsdecode(entry.contents.name))


def _build(hard: set[str], folder: Path) -> None:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise HostNpuUnavailableError(
            "the host NPU compiles a C file, and there is no cc, gcc or clang on PATH: install one (apt install gcc)"
        )
    source = folder / "stubs.c"
    source.write_text(source_text(BODIES.read_text(encoding="utf-8"), hard), encoding="utf-8")
    main = folder / LIBRARIES[0]
    _compile(compiler, source, main)
    empty = folder / "empty.c"
    empty.write_text("", encoding="utf-8")
    for name in LIBRARIES[1:]:
        # Functions are looked up per library, too: each leads to the first.
        _compile(compiler, empty, folder / name, "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", str(main))


def source_text(bodies: str, hard: set[str]) -> str:
    """The C file: the written-out functions, then each missing one, which fails."""
    written = set(WRITTEN.findall(bodies))
    fail = "".join(f"int {name}(void) {{ return {NOT_SUPPORTED}; }}\n" for name in sorted(hard - written))
    return f"{bodies}\n/* ---- generated */\n\n{fail}"


def _compile(compiler: str, source: Path, library: Path, *inputs: str) -> None:
    asked = [compiler, "-shared", "-fPIC", "-O1", "-fno-builtin", f"-Wl,-soname,{library.name}"]
    asked += ["-o", str(library), str(source), *inputs]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"the stub libraries of the host NPU do not compile. Asked: {' '.join(asked)}.\n{done.stderr}"
        )
