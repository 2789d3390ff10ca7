"""Files that last: put in their place so that a power cut loses none, and sealed with checksums so that damage is noticed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
"""In a folder that is needed later: its files with their sizes and SHA-256. Without one, as older versions left them, a folder isn't checked."""

SEAL = "crc"  # the key of a line's own checksum


def of_the_disk(error: Exception) -> bool:
    """True for what the system says of a file or a disk, also as safetensors, torch.save and tokenizers (which raises plain Exceptions) wrap it."""
    from safetensors import SafetensorError

    said = str(error)
    by_torch = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in said or "iostream error" in said)
    return isinstance(error, (OSError, SafetensorError)) or by_torch or (type(error) is Exception and "os error" in said)


def put(making: Path, path: Path) -> None:
    """Puts a finished file, or a finished folder where none is, at `path`: after a power cut there is the old one or the whole new one."""
    _settle(making)
    os.replace(making, path)
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Puts a text file in its place in one step."""
    making = path.with_name(f".making-{path.name}")
    making.write_text(text, "utf-8")
    put(making, path)


def swap(making: Path, path: Path) -> None:
    """Puts a finished folder at `path` in place of one that may be there, which `found_again` finds if this is cut short."""
    old = path.with_name(f".old-{path.name}")
    _settle(making)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    os.replace(making, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def drop(folder: Path) -> None:
    """Removes a folder: at once it is no more under its name, and what a kill leaves of it begins with .old-."""
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def found_again(path: Path) -> bool:
    """Puts back what a `swap` that was cut short had moved out of the way; True if there was something."""
    old = path.with_name(f".old-{path.name}")
    if path.exists() or not old.exists():
        return False
    old.rename(path)
    return True


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk. Windows has no such call for folders."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    number = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some network disks can't
            raise
    finally:
        os.close(number)


def _settle(path: Path) -> None:
    """`sync` of a file, or of a folder and all that is in it."""
    for inner in sorted(path.rglob("*"), reverse=True) if path.is_dir() else ():
        sync(inner)
    sync(path)


def seal(folder: Path, **more: Any) -> None:
    """Writes the manifest of a folder, last, with `more` entries beside its files (hidden ones apart)."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: [stamp(folder / name)] for name in names if name != MANIFEST and not name.startswith(".")}
    write_manifest(folder, {**more, "files": files})


def stamp(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Puts a manifest into a folder; it holds a checksum of itself."""
    write_whole(folder / MANIFEST, json.dumps(dict(entries) | {"sha256": _digest_of(entries)}, indent=1) + "\n")


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest, None if it has none; ValueError for one that is damaged itself."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.pop("sha256", None) != _digest_of(found):
        raise ValueError(f"{MANIFEST} is damaged")
    return found


def fault_in(folder: Path, *only: str) -> str:
    """What is wrong with a folder's files, or with `only` some of them, in a few words; "" if nothing is, or if it has no manifest."""
    try:
        manifest = manifest_of(folder)
    except (OSError, ValueError) as error:
        return str(error)
    for name, accepted in (manifest or {"files": {}})["files"].items():
        if only and name not in only:
            continue
        try:
            found = stamp(folder / name)
        except FileNotFoundError:
            found = None
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
        if found not in accepted:
            return f"{name} {_difference(found, accepted[0]['bytes'])}"
    return ""


def _difference(found: Mapping[str, Any] | None, size: int) -> str:
    if found is None:
        return "is missing"
    if found["bytes"] == 0:
        return "is empty"
    if found["bytes"] < size:
        return f"is cut short: {found['bytes']} of {size} bytes"
    return "isn't what was written: its checksum differs"


def sealed(line: Mapping[str, Any], of: str = "") -> str:
    """A line of JSON with a checksum of its own, which counts in what it is `of`: in another place it is damaged."""
    text = json.dumps(line, ensure_ascii=False)
    return f'{text[:-1]}, "{SEAL}": "{crc((text + of).encode())}"}}'


def unsealed(line: bytes, of: str = "") -> dict[str, Any]:
    """The object of a line that `sealed` or an older version wrote; ValueError for a damaged one, or one of something else."""
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("no object")
    if (said := found.pop(SEAL, None)) is not None and said != crc((json.dumps(found, ensure_ascii=False) + of).encode()):
        raise ValueError("its checksum differs")
    return found


def crc(data: bytes) -> str:
    """CRC-32 in hexadecimal: enough to tell a damaged line."""
    return f"{zlib.crc32(data):08x}"


def _digest_of(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
