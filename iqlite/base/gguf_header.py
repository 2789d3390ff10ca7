"""The header of a GGUF file, read by itself: the gguf library takes seconds over a vocabulary. No torch."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF's value types
_STRING, _ARRAY = 8, 9
LONGEST_TEXT = 2**24  # bytes; more is a broken file
A_NUMBER_A_LAYER = 1024  # an array of numbers no longer than this is read: heads or widths by layer


def gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(metadata, each tensor's sizes, the innermost first) of a GGUF file; of a long array, or one of texts, only its length."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("its first bytes aren't GGUF")
        _, tensor_count, field_count = _read(file, "IQQ")
        fields = dict(_fields(file, field_count))
        tensors = {}
        for _ in range(tensor_count):
            tensor = _text(file)
            (dimensions,) = _read(file, "I")
            tensors[tensor] = _read(file, f"{dimensions}QIQ")[:dimensions]
    return fields, tensors


def gguf_is_adapter(path: Path) -> bool:
    """True for a LoRA in a GGUF file, which is no model by itself; read off the first fields, before any vocabulary."""
    try:
        with path.open("rb") as file:
            *_, field_count = _read(file, "IIQQ")
            general = itertools.takewhile(lambda field: field[0].startswith("general."), _fields(file, field_count))
            return ("general.type", "adapter") in general
    except (OSError, ValueError, OverflowError, struct.error):  # who reads it whole says what is wrong with it
        return False


def _fields(file: BinaryIO, count: int) -> Iterator[tuple[str, Any]]:
    for _ in range(count):
        yield _text(file), _value(file, *_read(file, "I"))


def _read(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _text(file: BinaryIO) -> str:
    (length,) = _read(file, "Q")
    if length > LONGEST_TEXT:
        raise ValueError(f"a text of {length} bytes")
    return file.read(length).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return _read(file, _SCALARS[kind])[0]
    inside, length = _read(file, "IQ")
    if inside in _SCALARS and length <= A_NUMBER_A_LAYER:
        return _read(file, f"{length}{_SCALARS[inside]}")
    if inside in _SCALARS:
        file.seek(length * struct.calcsize(f"<{_SCALARS[inside]}"), 1)
    else:
        for _ in range(length):
            _value(file, inside)
    return length
