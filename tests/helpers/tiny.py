"""Tiny random models of every supported architecture, with a byte-level tokenizer and chat templates in the style of known families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto import CONFIG_MAPPING

from iqlite.model.policy import Policy

ARCHITECTURES = ("llama", "qwen2", "mistral", "gemma", "gemma2", "olmo2", "granite", "cohere")

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


def make_tokenizer(template: str = "chatml", *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, plus special tokens. `adds_bos`: a plain text gets a BOS, as with Llama's tokenizers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
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
    """A random model with two layers; weights large enough that its distributions are far from uniform."""
    options: dict[str, Any] = dict(
        vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, initializer_range=0.15, bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    if architecture in ("gemma", "gemma2"):
        options |= dict(head_dim=16)
    if architecture == "gemma2":
        options |= dict(final_logit_softcapping=5.0, attn_logit_softcapping=20.0, query_pre_attn_scalar=16, sliding_window=64)
    if architecture == "granite":
        options |= dict(logits_scaling=4.0, embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.5)
    if architecture == "cohere":
        options |= dict(logit_scale=0.25)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**(options | config)), dtype=torch.float32)
    return model.eval()


def save_tiny(folder: Path, architecture: str = "llama", template: str = "chatml", *, adds_bos: bool = False, **config: Any) -> Path:
    """A model folder in Hugging Face format that a recipe's `model.base` can name."""
    tokenizer = make_tokenizer(template, adds_bos=adds_bos)
    model = make_model(architecture, vocab=len(tokenizer) + 6, **config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shake(policy: Policy, seed: int = 1) -> None:
    """Gives every LoRA matrix random values, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
