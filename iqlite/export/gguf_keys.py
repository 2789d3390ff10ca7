"""A model's configuration and tokenizer → GGUF's keys, for the architectures that iqlite trains. The key names are the gguf library's."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import gguf

from iqlite.base.gguf_files import copy_fields
from iqlite.errors import BaseError

ARCHITECTURE = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "cohere": gguf.MODEL_ARCH.COMMAND_R,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "olmo3": gguf.MODEL_ARCH.OLMO2,
    "exaone4": gguf.MODEL_ARCH.EXAONE4,
}
ROTATED_IN_PAIRS = (
    "llama",
    "mistral",
    "granite",
    "smollm3",
)  # llama.cpp turns neighbours there, transformers a head's halves: q and k are permuted
NORM_PLUS_ONE = ("gemma", "gemma2", "gemma3_text")  # transformers stores the norm's weight minus one

# llama.cpp knows pre-tokenizers by name. These are their regular expressions as tokenizer.json spells them.
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")


def describe(writer: Any, config: Any) -> None:
    """The model's numbers."""
    kind = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    if kind == "cohere":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind != "granite" and getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if kind not in NORM_PLUS_ONE:
        writer.add_rope_dimension_count(head_dim)
    _rope(writer, config)
    if kind in ("gemma3_text", "olmo3", "exaone4"):
        writer.add_sliding_window(config.sliding_window)
    if kind in ("olmo3", "exaone4"):  # Gemma's pattern is llama.cpp's own knowledge
        writer.add_sliding_window_pattern([layer == "sliding_attention" for layer in config.layer_types])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if kind == "cohere":
        writer.add_logit_scale(config.logit_scale)


def _rope(writer: Any, config: Any) -> None:
    rope, near = rope_of(config), (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if near is not None:
        writer.add_rope_freq_base_swa(float(near["rope_theta"]))
    if kind in ("default", "llama3"):  # llama3's factors are a tensor
        if config.model_type == "cohere":
            writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        return
    if kind not in ("linear", "yarn"):
        raise BaseError(
            f"the base's position scaling {kind!r} can't be written as GGUF here: merge with --to hf and use llama.cpp's converter."
        )
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_of(config: Any) -> dict[str, Any]:
    """How positions are rotated; in the layers that see everything, where others see a window only."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    found: dict[str, Any] = rope.get("full_attention", rope)
    return found


def rope_factors(config: Any) -> list[float] | None:
    """Llama 3's stretch of each rotation's wavelength (transformers' `rope_type = "llama3"`), [head_dim / 2]; None for other models."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for pair in range(0, size, 2):
        turns = context / (2 * math.pi * rope["rope_theta"] ** (pair / size))  # in the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1.0 / ((1.0 - smooth) / rope["factor"] + smooth))
    return factors


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int, stop_ids: tuple[int, ...]) -> None:
    """Tokens, merges, special ids and the chat template; BaseError for a tokenizer that llama.cpp has no name for."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise BaseError(f"the base's tokenizer ({model['type']}) can't be written as GGUF here: use --to hf and llama.cpp's converter.")
    pieces = bool(model.get("byte_fallback"))  # as SentencePiece makes them, with ▁ for a space
    text = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    rank = {a + b: i for i, (a, b) in reversed(list(enumerate(_merges(model))))}
    tokens, kinds, scores = [], [], []
    for token_id in range(vocabulary):
        token, kind = text.get(token_id, f"[PAD{token_id}]"), gguf.TokenType.NORMAL
        if token_id not in text:
            kind = gguf.TokenType.UNUSED
        elif token_id in added:
            special = added[token_id].special or token_id in stop_ids
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
            if pieces and token_id == tokenizer.unk_token_id:
                kind = gguf.TokenType.UNKNOWN
            elif not special:
                token = token.replace("▁", " ") if pieces else token
        elif pieces and len(token) == 6 and token.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        tokens.append(token)
        kinds.append(kind)
        scores.append(float(-rank.get(token, len(rank))))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else pre_tokenizer(data))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if pieces:
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(_adds_space(data))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special_vocab = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=vocabulary)
    special_vocab.add_special_token = {
        "bos": tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    }
    for name in ("bos", "eos", "unk", "pad"):
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            special_vocab.special_token_ids[name] = found
    special_vocab.add_to_gguf(writer, quiet=True)
    ends = [token for token in stop_ids if token != tokenizer.eos_token_id]
    if ends:
        writer.add_eot_token_id(ends[0])


def pre_tokenizer(data: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer.json splits text before its merges; BaseError if it's none of the known ways."""
    found = data.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        pattern = parts[0]["pattern"].get("Regex")
        if pattern == _CL100K:
            return "llama-bpe" if data["model"].get("ignore_merges") else "dbrx"
        if pattern == _QWEN2:
            return "qwen2"
    raise BaseError(
        "the base's tokenizer splits text in a way that llama.cpp isn't known to have a name for: use --to hf and llama.cpp's converter."
    )


def _merges(model: dict[str, Any]) -> list[Any]:
    return [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges", [])]


def _adds_space(data: dict[str, Any]) -> bool:
    """True if a text gets a space before its first word."""
    before = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    return '"Prepend"' in before or ('"prepend_scheme"' in before and '"prepend_scheme": "never"' not in before)


def copy_metadata(writer: Any, original: Path) -> None:
    """Everything a GGUF file says of its model, for one with other weights of the same model."""
    ours = ("GGUF.", "general.architecture", "general.name", "general.file_type", "general.quantization_version", "quantize.", "split.")
    copy_fields(gguf.GGUFReader(original), writer, ours)
