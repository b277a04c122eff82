"""Compares two wheels: `python tests/wheels.py A.whl B.whl [--code]`.

Their lists of files must be equal; with --code also every section of the compiled library, but for
the linker's build id, as two builds of one commit are (docs/building.md). Exits with 1 if not.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import zipfile
from pathlib import Path

LIBRARY = "sm120_ops/_C.so"


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def sections(elf: bytes) -> dict[str, str]:
    """SHA-256 of each section of a 64-bit little-endian ELF file, by name."""
    assert elf[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    # sh_name, sh_type, then at 24: sh_offset, sh_size
    headers = [
        (*struct.unpack_from("<II", elf, start), *struct.unpack_from("<QQ", elf, start + 24))
        for start in range(table, table + size * count, size)
    ]
    names_offset = headers[names_index][2]
    no_bits = 8  # .bss has a size and no bytes
    found = {}
    for name, kind, offset, length in headers:
        start = names_offset + name
        text = elf[start : elf.index(b"\0", start)].decode()
        content = b"" if kind == no_bits else elf[offset : offset + length]
        found[text] = hashlib.sha256(content).hexdigest()
    return found


def library_sections(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        found = sections(archive.read(LIBRARY))
    found.pop(".note.gnu.build-id", None)  # a hash of the rest
    return found


def main(arguments: list[str]) -> int:
    first, second = (Path(name) for name in arguments if not name.startswith("--"))
    problems = [f"only in {first}: {name}" for name in sorted(files(first) - files(second))]
    problems += [f"only in {second}: {name}" for name in sorted(files(second) - files(first))]
    compared = f"{len(files(first))} files"
    if "--code" in arguments:
        ours, theirs = library_sections(first), library_sections(second)
        names = sorted(ours.keys() | theirs.keys())
        differ = [name for name in names if ours.get(name) != theirs.get(name)]
        problems += [f"{LIBRARY} differs in section {name}" for name in differ]
        compared += f", {len(names)} sections of {LIBRARY}"
    print(*problems or [f"equal: {compared}"], sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
