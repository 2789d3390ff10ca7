"""What the method needs of a language model, found in it whatever its architecture: decoder, layers, head, linear maps.

Nothing here is a list of architectures. What is found is proved at load (`model.proof`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iqlite.errors import BaseError, first_line

FUSED_OUT = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Model types whose kernels read the weight of `out_proj` and not the module: PEFT refuses an adapter there."""

OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Beside experts kept as one tensor, PEFT takes these names of other layers for the experts' and would adapt all of them."""
FAULTS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, ImportError)
"""What a model's code raises over numbers, caches and inputs that it doesn't expect."""


@dataclass(frozen=True)
class Anatomy:
    """`config` is the text part's; `layers` the decoder's; `head` the linear map to the vocabulary."""

    config: Any
    decoder: Any
    layers: nn.ModuleList
    head: nn.Linear

    @classmethod
    def of(cls, model: Any, name: str) -> Anatomy:
        """From a transformers model without adapters; BaseError says what it lacks."""
        config, decoder, head = model.config.get_text_config(decoder=True), model.get_decoder(), model.get_output_embeddings()
        if getattr(model.config, "is_encoder_decoder", False):
            raise BaseError(f"base {name!r} has an encoder beside its decoder, which isn't supported: choose a decoder-only model.")
        count = getattr(config, "num_hidden_layers", None)
        lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
        if decoder is model or not lists or not isinstance(head, nn.Linear):
            lacks = "a head that is one linear map" if lists else "a list of layers in its decoder"
            raise BaseError(f"base {name!r} ({config.model_type}) lacks {lacks}, which the method needs: choose another base.")
        found = cls(config, decoder, lists[0], head)
        if not found.linear_maps(model):
            raise BaseError(f"base {name!r} ({config.model_type}) has no linear maps in its layers for LoRA: choose another base.")
        return found

    def linear_maps(self, model: Any, *, beside: bool = False) -> dict[str, nn.Linear]:
        """The linear maps to adapt, by their names in the model; or those `beside` them: of a vision tower, read by fused kernels, beside experts."""
        inside = {id(module) for module in self.decoder.modules()}
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not self.head and (id(module) in inside and not self._fused(name)) != beside
        }

    def _fused(self, name: str) -> bool:
        last = name.rpartition(".")[2]
        return (self.config.model_type in FUSED_OUT and last == "out_proj") or (self._has_experts and last in OF_EXPERTS)

    @cached_property
    def _has_experts(self) -> bool:
        return any(name.endswith("experts.gate_up_proj") for name, _ in self.decoder.named_parameters())

    @property
    def norm(self) -> Tensor:
        """A vector of weights [D] after the layers, which tells one base from another; another vector where a model has none there."""
        inside = {id(parameter) for parameter in self.layers.parameters()}
        vectors = [p for _, p in self.decoder.named_parameters() if p.ndim == 1]
        after = [p for p in vectors if id(p) not in inside]
        named = getattr(getattr(self.decoder, "norm", None), "weight", None)
        return named if isinstance(named, Tensor) else (after or vectors or [self.head.weight.detach().flatten()])[-1]


def numbers(config: Any, key: str) -> list[float]:
    """A number of a configuration, for each kind of layer where layers differ in it; empty if it isn't there."""
    alike = not getattr(config, "is_heterogeneous", False) or key not in (config.per_layer_attributes or ())
    found = [getattr(one, key, None) for one in ([config] if alike else config.per_layer_config)]
    return [value for value in found if value]


def read_config(config: Mapping[str, Any], name: str) -> Any:
    """A config.json as transformers' configuration, without what it says of its weights' types; BaseError if it knows no such model."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    fields = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map", "dtype", "torch_dtype")}
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise BaseError(unknown(name, kind))
    try:
        with tempfile.TemporaryDirectory() as folder:  # only from a file does transformers read numbers that JSON can't spell
            file = Path(folder) / "config.json"
            file.write_text(json.dumps(fields), "utf-8")
            return CONFIG_MAPPING[kind].from_json_file(file)
    except (*FAULTS, StrictDataclassError) as error:  # each configuration class checks in its own way
        raise BaseError(f"base {name!r}: its config.json can't be used ({first_line(error)}); download it again.") from None


def unknown(name: str, kind: str) -> str:
    """The sentence for a model that transformers has no code for."""
    import transformers

    return (
        f"base {name!r}: transformers {transformers.__version__} has no code for a model of type {kind!r}, and a model's own code isn't run here: "
        "update transformers (pip install -U transformers), or choose another base."
    )


def auto_class(config: Any, name: str) -> Any:
    """transformers' class of classes that loads such a model with its head; BaseError if it isn't a language model."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise BaseError(f"base {name!r}: a {config.model_type!r} model is no decoder-only language model: choose one that answers chat.")


def empty(config: Any, name: str) -> Any:
    """The model of a configuration without weights."""
    loader = auto_class(config, name)
    try:
        with torch.device("meta"):
            return loader.from_config(config, trust_remote_code=False)
    except FAULTS as error:  # a model's code, over numbers that don't fit together
        raise BaseError(f"base {name!r}: no model can be made of its config.json ({first_line(error)}); download it again.") from None
