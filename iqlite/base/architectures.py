"""The numbers of a model's architecture, from its configuration or a GGUF header alone: no torch, no weights.

`SUPPORTED` are the model types whose head is known (`model.head`). The shapes of the shipped recipes' models, and of a few
others that people start from, are in data/architectures.json, so that `iqlite plan` needs no network.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

from iqlite.errors import BaseError

GGUF_ARCHITECTURES = ("llama", "mistral", "qwen2", "gemma2")  # what transformers can convert, of those whose head is known
SUPPORTED = ("llama", "qwen2", "mistral", "gemma", "gemma2", "olmo2", "granite", "cohere")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF's value types
_STRING, _ARRAY = 8, 9
LONGEST_TEXT = 2**24  # bytes; more is a broken file


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer: sizes are counts. `tied`: the head is the embedding."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    context: int

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str) -> Shape:
        """From a config.json; BaseError if the architecture isn't supported or a number is missing."""
        kind = str(config.get("model_type"))
        if kind not in SUPPORTED:
            raise BaseError(f"base {name!r}: the architecture {kind!r} isn't supported; choose one of: {', '.join(SUPPORTED)}.")
        try:
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            return cls(
                model_type=kind,
                hidden=hidden,
                layers=int(config["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                intermediate=int(config["intermediate_size"]),
                vocabulary=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", kind in ("gemma", "gemma2", "cohere"))),
                context=int(config.get("max_position_embeddings", 8192)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BaseError(f"base {name!r}: its config.json lacks or garbles {error}; download it again.") from None

    @classmethod
    def of_gguf(cls, path: Path, name: str) -> Shape:
        """From a GGUF file's header; BaseError if it can't be read."""
        try:
            fields, tensors = gguf_header(path)
            kind = fields["general.architecture"]
            if kind not in GGUF_ARCHITECTURES:
                known_kinds = ", ".join(GGUF_ARCHITECTURES)
                raise BaseError(f"base {name!r}: a GGUF of architecture {kind!r}, which isn't supported; choose one of: {known_kinds}.")
            found = {key.removeprefix(f"{kind}."): value for key, value in fields.items()}
            heads, hidden = found["attention.head_count"], found["embedding_length"]
            return cls(
                model_type=kind,
                hidden=hidden,
                layers=found["block_count"],
                heads=heads,
                kv_heads=found.get("attention.head_count_kv", heads),
                head_dim=found.get("attention.key_length", hidden // heads),
                intermediate=found["feed_forward_length"],
                vocabulary=found.get("vocab_size", fields["tokenizer.ggml.tokens"]),
                tied="output.weight" not in tensors,
                context=found["context_length"],
            )
        except (OSError, KeyError, ValueError, OverflowError, struct.error) as error:
            raise BaseError(f"base {name!r}: the GGUF file {path} can't be read ({error}); download it again.") from None

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear maps, each of which is quantised and has its LoRA."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        wide = (self.hidden, self.intermediate)
        return {
            "q": (self.hidden, q), "k": (self.hidden, kv), "v": (self.hidden, kv), "o": (q, self.hidden),
            "gate": wide, "up": wide, "down": wide[::-1],
        }  # fmt: skip

    @property
    def linear_weights(self) -> int:
        """Weights in all layers' linear maps."""
        return self.layers * sum(i * o for i, o in self.linears.values())

    @property
    def parameters(self) -> int:
        """All weights, norms left out."""
        return self.linear_weights + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of a LoRA of that rank on every linear map."""
        return self.layers * rank * sum(i + o for i, o in self.linears.values())


@cache
def known() -> Mapping[str, Mapping[str, Any]]:
    """Configurations that come with the package, by base name."""
    models = json.loads(files("iqlite").joinpath("data/architectures.json").read_text("utf-8"))["models"]
    return {name: entry["config"] for name, entry in models.items()}


def gguf_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """(metadata, tensor names) of a GGUF file; of an array only its length. The gguf library takes seconds over a vocabulary."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("its first bytes aren't GGUF")
        _, tensor_count, field_count = _read(file, "IQQ")
        fields = dict(_fields(file, field_count))
        names = set()
        for _ in range(tensor_count):
            names.add(_text(file))
            (dimensions,) = _read(file, "I")
            _read(file, f"{dimensions}QIQ")
    return fields, names


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
    if inside in _SCALARS:
        file.seek(length * struct.calcsize(f"<{_SCALARS[inside]}"), 1)
    else:
        for _ in range(length):
            _value(file, inside)
    return length
