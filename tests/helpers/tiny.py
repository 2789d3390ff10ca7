"""Tiny random models of every architecture that the suite tries, with a byte-level tokenizer and chat templates in the style of known families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto import CONFIG_MAPPING

from iqlite.base.anatomy import auto_class
from iqlite.model.policy import Policy

ARCHITECTURES = ("llama", "qwen2", "mistral", "gemma", "gemma2", "olmo2", "granite", "cohere")
"""Those that load without a proof, since the suite proves them."""

_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
_LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
_MAMBA = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=16)
_GEMMA4 = dict(sliding_window=32, global_head_dim=32, hidden_size_per_layer_input=8, layer_types=_SLIDING[1:] + _SLIDING[1:])
_VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_5": dict(text_config=_LINEAR, vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)),
    "gemma3_text": dict(sliding_window=32, query_pre_attn_scalar=16, layer_types=_SLIDING),
    "gemma3": dict(text_config=dict(sliding_window=32, query_pre_attn_scalar=16), vision_config=_VISION, mm_tokens_per_image=4),
    "gemma4_text": _GEMMA4 | dict(num_kv_shared_layers=2),
    "gemma4": dict(text_config=_GEMMA4 | dict(num_kv_shared_layers=0), vision_config=None, audio_config=None),
    "phi3": dict(head_dim=None),
    "smollm3": dict(head_dim=None),
    "olmo3": dict(sliding_window=32, layer_types=_SLIDING, head_dim=None),
    "ministral": dict(sliding_window=32),
    "ministral3": {},
    "mistral3": dict(text_config=dict(model_type="ministral3"), vision_config=dict(model_type="pixtral", **_VISION)),
    "granitemoehybrid": dict(
        logits_scaling=4.0, embedding_multiplier=3.0, num_local_experts=0, shared_intermediate_size=128, layer_types=["attention"] * 3, head_dim=None
    ),
    "glm4": {},
    "exaone4": dict(sliding_window=32, layer_types=_SLIDING, head_dim=None),
    "cohere2": dict(sliding_window=32, logit_scale=0.25, layer_types=_SLIDING),
    "stablelm": dict(head_dim=None),
    "lfm2": dict(layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False, head_dim=None),
    "falcon_h1": _MAMBA | dict(lm_head_multiplier=0.5),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=32, layer_types=_SLIDING),
}  # fmt: skip
"""Families that are proved when they are loaded, by transformers' model type, with what their configurations have of their own."""

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    # Llama 2 folds the system text into [INST] itself and puts a BOS before every user turn.
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
        " + m['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% else %}"
        "{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    # Mistral's first instruct template refuses a system turn and demands alternation.
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "qwen2.5": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + _CHATML
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
        " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "chatml": _CHATML,
    "none": None,
}
SPECIAL = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)


def make_tokenizer(template: str = "chatml", *, adds_bos: bool = False, merges: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, plus special tokens. `adds_bos`: a plain text gets a BOS, as with Llama's tokenizers. `merges`: one more, of two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["th"] * merges
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[("t", "h")] if merges else []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    eos = {"chatml": "<|im_end|>", "qwen2.5": "<|im_end|>"}.get(template, "</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos, pad_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
        )
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def make_model(architecture: str = "llama", *, vocab: int = 320, seed: int = 0, **config: Any) -> Any:
    """A random model with two layers, or as many as its kinds; weights large enough that its distributions are far from uniform."""
    own = FAMILIES.get(architecture, {})
    text: dict[str, Any] = dict(
        vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, initializer_range=0.15, bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    if architecture in ("gemma", "gemma2"):
        text |= dict(head_dim=16)
    if architecture == "gemma2":
        text |= dict(final_logit_softcapping=5.0, attn_logit_softcapping=20.0, query_pre_attn_scalar=16, sliding_window=64)
    if architecture == "granite":
        text |= dict(logits_scaling=4.0, embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.5)
    if architecture == "cohere":
        text |= dict(logit_scale=0.25)
    if own or architecture in FAMILIES:
        kinds = own.get("text_config", own).get("layer_types", (1, 2, 3, 4))
        text |= dict(head_dim=16, num_hidden_layers=len(kinds), vocab_size_per_layer_input=vocab) | own.get("text_config", own)
        text = {
            key: value
            for key, value in text.items()
            if value is not None and (key != "vocab_size_per_layer_input" or "gemma4" in architecture)
        }
    if "text_config" in own:
        settings = CONFIG_MAPPING[architecture](**(own | {"text_config": text | config}))
    else:
        settings = CONFIG_MAPPING[architecture](**(text | config))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(settings, architecture).from_config(settings, dtype=torch.float32)
    return model.eval()


def save_tiny(
    folder: Path, architecture: str = "llama", template: str = "chatml", *, adds_bos: bool = False, merges: bool = False, **config: Any
) -> Path:
    """A model folder in Hugging Face format that a recipe's `model.base` can name."""
    tokenizer = make_tokenizer(template, adds_bos=adds_bos, merges=merges)
    model = make_model(architecture, vocab=len(tokenizer) + 6, **config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.get_text_config(decoder=True).eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shake(policy: Policy, seed: int = 1) -> None:
    """Gives every LoRA matrix random values, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
