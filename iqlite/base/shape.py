"""The numbers of a model, from its configuration or a GGUF header alone: no weights, and no torch for the usual families.

The shapes of the shipped recipes' models, and of a few others that people start from, are in data/architectures.json, so that
`iqlite plan` needs no network. A configuration of another family is counted on a model without weights, which takes seconds.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from iqlite.base.gguf_header import gguf_header
from iqlite.errors import BaseError, first_line

USUAL = frozenset(
    [
        "llama",
        "mistral",
        "ministral",
        "ministral3",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "smollm3",
        "olmo2",
        "olmo3",
        "granite",
        "glm4",
        "phi3",
        "cohere",
        "cohere2",
        "stablelm",
    ]
)
"""Model types of seven linear maps a layer (some of them fused): q, k, v, o, gate, up, down. A test holds them against counting."""
FUSED = {"phi3": ("qkv", "gate_up"), "glm4": ("gate_up",)}
TIED = ("gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "smollm3")  # where the configuration doesn't say
HEAD_DIM = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128, "ministral3": 128}  # likewise
_LAYER = re.compile(r"blk\.\d+\.")
_NO_MAP = ("conv", "norm", "_inp.")  # parts of a GGUF tensor's name


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer: sizes are counts. `tied`: the head is the embedding.

    `maps` are the linear maps of all layers, (in, out, how many), each of which is quantised and has its LoRA; `attending` the layers
    that keep keys and values; `unread` the weights of linear maps beside the decoder (a vision tower's); `other` all other weights,
    kept as they are: experts, convolutions, tables.
    """

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
    maps: tuple[tuple[int, int, int], ...]
    attending: int
    unread: int = 0
    other: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str) -> Shape:
        """From a config.json; BaseError if a number is missing, or transformers knows no such model."""
        kind = str(config.get("model_type"))
        if "counted" in config:  # a shape that comes with the package
            return cls(**{**config["counted"], "maps": tuple(map(tuple, config["counted"]["maps"]))})
        try:
            if kind in USUAL and _unmixed(config):
                shape = cls._usual(kind, config)
                shape.check()
                return shape
        except (AttributeError, OverflowError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise BaseError(f"base {name!r}: its config.json lacks or garbles {first_line(error)}; download it again.") from None
        return cls._counted(config, name)

    @classmethod
    def _usual(cls, kind: str, config: Mapping[str, Any]) -> Shape:
        heads, hidden, layers = int(config["num_attention_heads"]), int(config["hidden_size"]), int(config["num_hidden_layers"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or HEAD_DIM.get(kind) or hidden // heads)
        wide = int(config["intermediate_size"])
        maps = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "gate": wide, "up": wide}
        for fused in FUSED.get(kind, ()):
            maps[fused] = sum(maps.pop(part) for part in (("q", "k", "v") if fused == "qkv" else ("gate", "up")))
        counts = Counter([(hidden, out) for out in maps.values()] + [(heads * head_dim, hidden), (wide, hidden)])
        return cls(
            model_type=kind,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=wide,
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", kind in TIED)),
            context=int(config.get("max_position_embeddings", 8192)),
            maps=tuple((*size, layers * count) for size, count in sorted(counts.items())),
            attending=layers,
        )

    @classmethod
    def _counted(cls, config: Mapping[str, Any], name: str) -> Shape:
        """Counted on the model itself, made without weights."""
        from iqlite.base.anatomy import Anatomy, empty, numbers, read_config

        read = read_config(config, name)
        model = empty(read, name)
        found = Anatomy.of(model, name)
        text, sizes = found.config, Counter((m.in_features, m.out_features) for m in found.linear_maps(model).values())
        maps = tuple((inside, out, count) for (inside, out), count in sorted(sizes.items()))
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(found.layers)
        hidden = int(text.hidden_size)
        heads = int(max(numbers(text, "num_attention_heads"), default=1))
        shape = cls(
            model_type=text.model_type,
            hidden=hidden,
            layers=len(found.layers),
            heads=heads,
            kv_heads=int(max(numbers(text, "num_key_value_heads"), default=heads)),
            head_dim=int(max(numbers(text, "head_dim"), default=hidden // heads)),
            intermediate=max(out for _, out, _ in maps),
            vocabulary=found.head.weight.shape[0],
            tied=model.get_input_embeddings().weight is found.head.weight,
            context=context_of(text),
            maps=maps,
            attending=sum("linear" not in kind and kind not in ("conv", "mamba") for kind in kinds),
            unread=sum(module.weight.numel() for module in found.linear_maps(model, beside=True).values()),
        )
        everything = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
        return replace(shape, other=max(0, everything - shape.parameters))

    @classmethod
    def of_gguf(cls, parts: Sequence[Path], name: str) -> Shape:
        """From the header of a GGUF file, or of each of its parts; BaseError if it can't be read."""
        path = parts[0]
        try:
            headers = [gguf_header(part) for part in parts]
            fields, tensors = headers[0][0], {key: size for _, found in headers for key, size in found.items()}
            kind = fields["general.architecture"]
            found = {
                key.removeprefix(f"{kind}."): max(value) if isinstance(value, tuple) and value else value for key, value in fields.items()
            }
            heads, hidden = found["attention.head_count"], found["embedding_length"]
            matrices = [
                size for key, size in tensors.items() if _LAYER.match(key) and len(size) == 2 and not any(n in key for n in _NO_MAP)
            ]
            kv_heads = fields.get(f"{kind}.attention.head_count_kv", heads)
            shape = cls(
                model_type=kind,
                hidden=hidden,
                layers=found["block_count"],
                heads=heads,
                kv_heads=found.get("attention.head_count_kv", heads),
                head_dim=found.get("attention.key_length", hidden // heads),
                intermediate=found["feed_forward_length"],
                vocabulary=tensors["token_embd.weight"][1],
                tied="output.weight" not in tensors,
                context=found["context_length"],
                maps=tuple((inside, out, count) for (inside, out), count in sorted(Counter(matrices).items())),
                attending=sum(map(bool, kv_heads)) if isinstance(kv_heads, tuple) else found["block_count"],
            )
            everything = sum(math.prod(size) for size in tensors.values() if len(size) > 1)
            shape.check()
            return replace(shape, other=max(0, everything - shape.parameters))
        except (OSError, KeyError, IndexError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise BaseError(f"base {name!r}: the GGUF file {path} can't be read ({first_line(error)}); download it again.") from None

    def check(self) -> None:
        """ValueError for sizes that no model has."""
        for key in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "context"):
            size = getattr(self, key)
            if not isinstance(size, int) or not 0 < size < 2**32:
                raise ValueError(f"a model's {key} can't be {str(size)[:40]}")
        if not self.maps:
            raise ValueError("it has no linear maps")

    @property
    def linear_weights(self) -> int:
        """Weights in all layers' linear maps."""
        return sum(i * o * count for i, o, count in self.maps)

    @property
    def parameters(self) -> int:
        """All weights but vectors (norms, biases)."""
        return self.linear_weights + self.unread + self.other + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of a LoRA of that rank on every linear map."""
        return rank * sum((i + o) * count for i, o, count in self.maps)


def context_of(config: Any) -> int:
    """Longest sequence a model was made for, tokens; 8192 where its configuration doesn't say."""
    return int(getattr(config, "max_position_embeddings", None) or 8192)


def _unmixed(config: Mapping[str, Any]) -> bool:
    """True if all layers of a configuration are alike: none is a mixture of experts, none keeps another kind of state."""
    return all("attention" in kind and "linear" not in kind for kind in config.get("layer_types") or ())


@cache
def known() -> Mapping[str, Mapping[str, Any]]:
    """Configurations that come with the package, by base name."""
    models = json.loads(files("iqlite").joinpath("data/architectures.json").read_text("utf-8"))["models"]
    return {name: entry["config"] for name, entry in models.items()}
