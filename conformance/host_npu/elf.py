"""The symbols of a shared library, read from its ELF file: no binutils needed. 64-bit little-endian files only."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from ospnext.errors import ConfigError

_SHT_DYNAMIC, _SHT_DYNSYM = 6, 11
_DT_NEEDED = 1
_WEAK = 2


@dataclass(frozen=True)
class SharedLibrary:
    """What a library takes from others and gives to them.

    Attributes:
        needed: names of the libraries it is linked with.
        undefined: symbols it must find elsewhere when it is loaded; weak ones, which may be missing, are left out.
        defined: symbols it exports.
    """

    needed: tuple[str, ...]
    undefined: frozenset[str]
    defined: frozenset[str]


def read(path: Path) -> SharedLibrary:
    """Read the dynamic symbol table of `path`.

    Raises:
        ConfigError: it is no 64-bit little-endian ELF file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read(path, data)


def _read(path: Path, data: mmap.mmap) -> SharedLibrary:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ConfigError(f"{path} is no 64-bit little-endian ELF library; the host NPU cannot read it")
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + n * size) for n in range(count)]
    needed: list[str] = []
    undefined: set[str] = set()
    defined: set[str] = set()
    for _, kind, _, _, start, length, link, *_ in sections:
        if kind not in (_SHT_DYNAMIC, _SHT_DYNSYM):
            continue
        names = data[sections[link][4] : sections[link][4] + sections[link][5]]
        table = data[start : start + length]
        if kind == _SHT_DYNAMIC:
            needed += [_text(names, value) for tag, value in struct.iter_unpack("<qQ", table) if tag == _DT_NEEDED]
            continue
        for name, info, _, section, _, _ in struct.iter_unpack("<IBBHQQ", table):
            if section:
                defined.add(_text(names, name))
            elif name and info >> 4 != _WEAK:
                undefined.add(_text(names, name))
    return SharedLibrary(tuple(needed), frozenset(undefined), frozenset(defined))


def _text(names: bytes, start: int) -> str:
    return names[start : names.index(b"\0", start)].decode()
