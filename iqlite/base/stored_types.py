"""In what types a base's files keep its weights: plain, in bitsandbytes' 4 bits (used as they are), or in a way that can't be trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from iqlite.errors import BaseError, first_line

PLAIN = ("F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F64")  # U8: bitsandbytes' packed weights, and buffers of some models
INSTEAD = "take the model's 16-bit original, a folder of it in bitsandbytes' 4 bits (…-bnb-4bit), or a GGUF file"


def is_packed(config: Any, name: str) -> bool:
    """True for a base that is stored in bitsandbytes' 4 bits; BaseError names any other quantisation."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return False
    told: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(told.get("quant_method", "an unknown way"))
    if method == "bitsandbytes" and (told.get("load_in_4bit") or told.get("_load_in_4bit")):
        return True
    said = "8 bits by bitsandbytes" if method == "bitsandbytes" else method
    raise BaseError(f"base {name!r} is stored as {said}, which can't be trained on and merged into: {INSTEAD}.")


def check_files(folder: Path, name: str) -> None:
    """BaseError for a file that is missing, broken or of a type that can't be computed with; reads headers alone."""
    index = folder / "model.safetensors.index.json"
    try:
        wanted = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())) if index.is_file() else []
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise BaseError(f"base {name!r}: {index} can't be read ({first_line(error)}); download it again.") from None
    check_inside(wanted, name)
    for file in wanted:
        if not (folder / file).is_file():
            raise BaseError(f"base {name!r} lacks {file}, one of its {len(wanted)} files of weights: download it again.")
    for path in [folder / file for file in wanted] or sorted(folder.glob("*.safetensors")):
        strange = {str(kind) for kind in _types(path)} - {*PLAIN}
        if strange:
            raise BaseError(
                f"base {name!r} stores weights as {', '.join(sorted(strange))}, which can't be trained on and merged into: {INSTEAD}."
            )


def check_inside(files: Iterable[Any], name: str) -> None:
    """BaseError for a file that an index names outside the base's own folder."""
    for file in files:
        if not isinstance(file, str) or not file or file in (".", "..") or any(c in file for c in "/\\:\0"):
            raise BaseError(
                f"base {name!r}: its index of weights names {str(file)[:80]!r}, which is no file of its folder: download it again from somebody you trust."
            )


def _types(path: Path) -> set[Any]:
    """The types that a safetensors file's header names; none for a broken one, which its reader says."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > 2**27:
            return set()
        try:
            header = json.loads(file.read(size))
            return {tensor["dtype"] for key, tensor in header.items() if key != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return set()
