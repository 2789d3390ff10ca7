"""The header of a GGUF file, read by itself: the gguf library takes seconds over a vocabulary, and believes what a file says. No torch.

Nothing is read or reserved that the file's own size has no room for, so that a header that lies is refused at once.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF's value types
_STRING, _ARRAY = 8, 9
TEXT_BYTES, FIELD_BYTES, TENSOR_BYTES = 8, 13, 24  # the least that a text, a field or a tensor takes in a header
MOST_DIMENSIONS = 4
KINDS = frozenset(range(64))  # of a tensor's numbers; the gguf library knows which there are
A_NUMBER_A_LAYER = 1024  # an array of numbers no longer than this is read: heads or widths by layer


def gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(metadata, each tensor's sizes, the innermost first) of a GGUF file; of a long array, or one of texts, only its length.

    ValueError, or OSError, for a file that can't be read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("its first bytes aren't GGUF")
        version, tensor_count, field_count = _read(file, "IQQ")
        if version not in (2, 3):
            raise ValueError(f"it is of GGUF's version {version}")
        _check_room(file, tensor_count, TENSOR_BYTES)
        _check_room(file, field_count, FIELD_BYTES)
        fields = dict(_fields(file, field_count))
        tensors = {}
        for _ in range(tensor_count):
            tensor = _text(file)
            (dimensions,) = _read(file, "I")
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            *sizes, kind, offset = _read(file, f"{dimensions}QIQ")
            if kind not in KINDS:
                raise ValueError(f"a tensor of unknown type {kind}")
            numbers = math.prod(sizes)
            if not 0 < numbers < 2**46 or offset + numbers // 8 > _size(file):  # no type has less than a bit for a number
                raise ValueError(f"the tensor {tensor[:80]!r} reaches beyond the end of the file")
            tensors[tensor] = tuple(sizes)
    return fields, tensors


def gguf_is_adapter(path: Path) -> bool:
    """True for a LoRA in a GGUF file, which is no model by itself; read off the first fields, before any vocabulary."""
    try:
        with path.open("rb") as file:
            *_, field_count = _read(file, "IIQQ")
            _check_room(file, field_count, FIELD_BYTES)
            general = itertools.takewhile(lambda field: field[0].startswith("general."), _fields(file, field_count))
            return ("general.type", "adapter") in general
    except (OSError, ValueError):  # who reads it whole says what is wrong with it
        return False


def _fields(file: BinaryIO, count: int) -> Iterator[tuple[str, Any]]:
    for _ in range(count):
        yield _text(file), _value(file, *_read(file, "I"))


def _read(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    size = struct.calcsize(f"<{layout}")
    _check_room(file, 1, size)
    return struct.unpack(f"<{layout}", file.read(size))


def _text(file: BinaryIO) -> str:
    (length,) = _read(file, "Q")
    _check_room(file, length, 1)
    return file.read(length).decode("utf-8")


def _value(file: BinaryIO, kind: int, depth: int = 0) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return _read(file, _SCALARS[kind])[0]
    if depth:
        raise ValueError("an array of arrays")
    inside, length = _read(file, "IQ")
    if inside in _SCALARS and length <= A_NUMBER_A_LAYER:
        return _read(file, f"{length}{_SCALARS[inside]}")
    if inside in _SCALARS:
        size = length * struct.calcsize(f"<{_SCALARS[inside]}")
        _check_room(file, 1, size)
        file.seek(size, 1)
    else:
        _check_room(file, length, TEXT_BYTES)
        for _ in range(length):
            _value(file, inside, depth + 1)
    return length


def _check_room(file: BinaryIO, count: int, each: int) -> None:
    """ValueError where the rest of the file is shorter than what it is said to hold."""
    if count * each > _size(file) - file.tell():
        raise ValueError("it ends before what its header announces")


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size
