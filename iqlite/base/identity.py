"""Which adapter belongs to which base: a base's identity, and what makes an adapter one of its own. No torch at the top."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iqlite.base.names import hub_name, is_hub_id
from iqlite.errors import AdapterError, BaseError, first_line

if TYPE_CHECKING:
    from torch import Tensor

IDENTITY_FILE = "iqlite.json"
IDENTITY_TOLERANCE = 2.0**-7  # relative; what bfloat16, float16 and float32 copies of one weight may differ by
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PLAIN = {
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision",
    "peft_version", "auto_mapping", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying", "eva_config",
}  # fmt: skip
"""Keys of PEFT's LoRA configuration under which an adapter stays B·A on linear maps; any other may only be empty."""
_BEYOND = {
    "trainable_token_indices": "trains single tokens' embeddings",
    "target_parameters": "adapts parameters that aren't linear maps",
    "alora_invocation_tokens": "begins at certain tokens only",
    "layer_replication": "repeats layers",
    "megatron_config": "is split over several cards",
    "use_dora": "is a DoRA",
    "modules_to_save": "holds whole modules (modules_to_save)",
    "lora_bias": "has biases",
}
_OWN_BEGINNING = ("true", "false", "gaussian", "eva", "orthogonal", "none")
"""Values of init_lora_weights that leave the base's weights alone."""


@dataclass(frozen=True)
class Identity:
    """What tells one base from another, whatever its folder is called and its dtype is: its shape and some of its weights."""

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    layers: int
    weights: tuple[float, ...]

    @classmethod
    def of(cls, name: str, config: Any, norm: Tensor, head: Tensor) -> Identity:
        """From the configuration of a model's text part, its last norm's weight [D] and its head's [V, D]."""
        import torch

        found: list[float] = []
        for weight, count in ((norm, 16), (head, 48)):
            at = torch.linspace(0, weight.numel() - 1, count, dtype=torch.float64).long()
            found += weight.detach().flatten()[at.to(weight.device)].float().tolist()
        return cls(name, config.model_type, config.vocab_size, config.hidden_size, config.num_hidden_layers, tuple(found))

    def same_base(self, other: Identity) -> bool:
        """True if both describe the same weights, in whatever 16- or 32-bit type; two hub ids that differ never do."""
        shape, other_shape = ((i.model_type, i.vocab_size, i.hidden_size, i.layers) for i in (self, other))
        if shape != other_shape or (is_hub_id(self.name) and is_hub_id(other.name) and self.name != other.name):
            return False
        return all(abs(a - b) <= IDENTITY_TOLERANCE * max(abs(a), abs(b)) + 1e-6 for a, b in zip(self.weights, other.weights, strict=True))

    def write(self, folder: Path, step: int | None = None) -> None:
        """Puts it beside an adapter, with the step it was saved after, if that is known."""
        found = {"base": asdict(self)} | ({} if step is None else {"step": step})
        (folder / IDENTITY_FILE).write_text(json.dumps(found, indent=2) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Identity | None:
        """The identity beside an adapter that iqlite wrote; None for an adapter from elsewhere."""
        try:
            found = _beside(folder)
            return None if found is None else cls.from_record(found["base"])
        except (ValueError, KeyError, TypeError) as error:
            raise BaseError(f"{folder / IDENTITY_FILE} can't be read ({error}): delete it or save the adapter again.") from None

    @classmethod
    def from_record(cls, fields: dict[str, Any]) -> Identity:
        """From what `asdict` wrote."""
        return cls(**{**fields, "weights": tuple(fields["weights"])})


def saved_after(folder: Path) -> int | None:
    """The step after which an adapter was saved; None where it doesn't say."""
    try:
        return int((_beside(folder) or {})["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _beside(folder: Path) -> Any:
    """What `Identity.write` put beside an adapter; None where nothing is."""
    try:
        return json.loads((folder / IDENTITY_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Lora:
    """A plain LoRA's configuration: each of its layers adds `scale`·B·A to a linear map."""

    rank: int
    scale: float


def check_adapter(folder: Path, base: Identity) -> Lora:
    """What `folder` holds; AdapterError unless it's a plain LoRA in safetensors that was made on this base."""
    config = read_config(folder)
    made_on = Identity.read(folder)
    if made_on is not None:
        if not made_on.same_base(base):
            raise AdapterError(f"{folder} was trained on {made_on.name}, not on {base.name}: use it with its own base.")
    else:  # its base's name says little: a path of another machine, a 4-bit copy, nothing; whether its shapes fit shows when it's loaded
        said, own = (_plain_name(str(name)) for name in (config.get("base_model_name_or_path") or "", hub_name(base.name)))
        if said and said != own and _is_model_name(config["base_model_name_or_path"]):
            raise AdapterError(
                f"{folder} was trained on {config['base_model_name_or_path']}, not on {base.name}: use it with its own base, or take base_model_name_or_path out of its {ADAPTER_CONFIG} if they are the same."
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not 0 < rank < 2**20 or not isinstance(alpha, (int, float)):
        raise AdapterError(f"{folder / ADAPTER_CONFIG} names no rank and scale (r, lora_alpha): save the adapter again.")
    return Lora(rank, alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _plain_name(name: str) -> str:
    """A base's name without owner, folders, and what only tells how it is stored."""
    last = re.split(r"[/\\\\]", name.rstrip("/\\"))[-1].lower()
    snapshot = re.search(r"models--[^/\\\\]*--([^/\\\\]+)", name)
    return re.sub(r"(-unsloth)?(-bnb-4bit|-4bit|-gguf|\.gguf)$", "", snapshot[1].lower() if snapshot else last)


def _is_model_name(name: str) -> bool:
    """True for what names a model: a hub id, or a folder with a name of its own."""
    return not re.fullmatch(r"[0-9a-f]{40}|checkpoint-\d+|model|base|merged", _plain_name(name))


def read_config(folder: Path) -> dict[str, Any]:
    """A plain LoRA's adapter_config.json; AdapterError says what is missing, or what other formats and the base itself couldn't hold."""
    config_file = folder / ADAPTER_CONFIG
    if not config_file.is_file():
        raise AdapterError(f"{folder} holds no {ADAPTER_CONFIG}: name a folder in PEFT format, such as a run's adapter/ folder.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise AdapterError(f"{folder} holds no {ADAPTER_WEIGHTS} (pickled weights aren't loaded): save the adapter again as safetensors.")
    try:
        config: dict[str, Any] = json.loads(config_file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{config_file} isn't valid JSON ({error}): save the adapter again.") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{config_file} holds no JSON object: save the adapter again.")
    if "lm_head" in str(config.get("target_modules")):
        raise AdapterError(f"{folder} adapts the LM head, which stays the base's here: train one on the other linear layers.")
    if "embed_tokens" in str(config.get("target_modules")):
        raise AdapterError(
            f"{folder} adapts the embedding, which a merge or a GGUF couldn't hold: train a plain LoRA on the linear layers."
        )
    begun = str(config.get("init_lora_weights", True))
    if begun.lower() not in _OWN_BEGINNING:
        raise AdapterError(
            f"{folder} was begun by {begun}, which changes the base's own weights: convert it to a plain LoRA (PEFT's path_initial_model_for_weight_conversion)."
        )
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise AdapterError(f"{folder} isn't a plain LoRA (bias and other methods change the base too): train a plain one.")
    for key, value in config.items():
        if value and key not in _PLAIN and key not in ("init_lora_weights", "bias"):
            what = _BEYOND.get(key, f"is more than a plain LoRA ({key})")
            raise AdapterError(f"{folder} {what}, which a merge or a GGUF couldn't hold: train a plain LoRA on the linear layers.")
    _check_tensors(folder)
    return config


def _check_tensors(folder: Path) -> None:
    """AdapterError unless the file holds pairs of matrices and nothing else; reads its header alone."""
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} can't be read ({first_line(error)}): save the adapter again.") from None
    for name, shape in shapes.items():
        other = name.replace(".lora_A.", ".lora_?.").replace(".lora_B.", ".lora_A.").replace(".lora_?.", ".lora_B.")
        if other == name or len(shape) != 2 or other not in shapes:
            raise AdapterError(
                f"{path} holds {name}, which is no pair of matrices of a linear map: train a plain LoRA on the linear layers."
            )
    if not shapes:
        raise AdapterError(f"{path} holds no weights: save the adapter again.")


def check_mergeable(folder: Path) -> None:
    """AdapterError for a LoRA whose layers differ in rank or scale: one number each is all that a merge or a GGUF knows of."""
    config = read_config(folder)
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise AdapterError(f"{folder} has a {key}: layers of different rank or scale can't be merged or exported here.")
