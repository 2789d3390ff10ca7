"""A base of any size with random weights, in 4 bits, built layer by layer: never a float copy of the whole.

Each distinct linear map is drawn and quantised once; its layers get copies of the packed numbers, which take their own memory (none if
`shared`: for who copies them elsewhere).
The tokenizer is the embedded model's, whose ids are below every vocabulary here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto import CONFIG_MAPPING

from iqlite.base.identity import Identity
from iqlite.base.loading import Base, train_on_any_cpu
from iqlite.base.names import EMBEDDED, locate
from iqlite.device import here

STD = 0.02


def random_base(config: Mapping[str, Any], seed: int = 0, *, tokenizer: bool = True, shared: bool = False) -> Base:
    """The architecture of a config.json with normal weights, NF4 with double quantisation, where and as a real base is loaded.

    `tokenizer` False: without one, for a machine that hasn't the embedded model. `shared`: maps of one shape share their weights.
    """
    device, dtype = here()
    options = dict(config)
    settings = CONFIG_MAPPING[options.pop("model_type")](**options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    torch.manual_seed(seed)
    made: dict[tuple[int, int], Params4bit] = {}
    for layer in model.get_decoder().layers:
        for parent in layer.modules():
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, _quantised(child, made, device, dtype, shared))
    _fill(model, device, dtype)
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(device)
    words = AutoTokenizer.from_pretrained(locate(EMBEDDED)) if tokenizer else None
    model.generation_config = GenerationConfig(eos_token_id=2 if words is None else words.eos_token_id)
    model.requires_grad_(False)
    model.is_loaded_in_4bit, model.is_quantized = True, True
    train_on_any_cpu(model)
    name = f"random {settings.model_type}, {settings.num_hidden_layers} layers of {settings.hidden_size}"
    return Base(name, model, words, dtype, "nf4", Identity(name, settings.model_type, 0, 0, 0, ()))


def _quantised(
    linear: nn.Linear, made: dict[tuple[int, int], Params4bit], device: torch.device, dtype: torch.dtype, shared: bool
) -> Linear4bit:
    shape = (linear.out_features, linear.in_features)
    layer = Linear4bit(
        *shape[::-1], bias=linear.bias is not None, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    if shape not in made:
        weight = torch.empty(shape, dtype=dtype).normal_(std=STD)
        made[shape] = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to(device)
        layer.weight = made[shape]
    elif shared:
        first = made[shape]
        own = copy.copy(first.quant_state)
        own.state2 = copy.copy(own.state2)
        layer.weight = Params4bit(first.data, requires_grad=False, **{**vars(first), "quant_state": own, "module": layer})
    else:
        first = made[shape]
        layer.weight = Params4bit.from_prequantized(
            first.data.clone(), _state(first.quant_state), requires_grad=False, device=device, module=layer
        )
    layer.quant_state = layer.weight.quant_state
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype), requires_grad=False)
    return layer


def _state(state: QuantState) -> dict[str, Tensor]:
    """The state as its file has it, each tensor a copy."""
    return {name: value.clone() for name, value in copy.copy(state).as_dict(packed=True).items()}


def _fill(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Embeddings, head and norms."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            full = torch.empty(parameter.shape, device=device, dtype=dtype)
            full = full.normal_(std=STD) if full.dim() > 1 else full.fill_(1.0)
            setattr(module, name, nn.Parameter(full, requires_grad=False))
        if hasattr(module, "scalar_embed_scale"):  # Gemma's
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
    model.tie_weights()
