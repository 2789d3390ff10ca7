"""Files and texts as nobody should write them, by kind, for hypothesis; and what iqlite makes of each: fine, or a sentence for a person.

`tests/whole/test_bad_input.py` tries a few dozen of each kind, `python -m tests.bench.fuzz` as many as one likes.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from iqlite.base.gguf_files import convert_gguf, told
from iqlite.base.identity import read_config
from iqlite.base.loading import read_tokenizer
from iqlite.base.names import find_gguf, shape_of
from iqlite.base.stored_types import check_files
from iqlite.commands.options import there
from iqlite.evaluation.safety import load_items
from iqlite.model.template import Chat, Description
from iqlite.places import path_of
from iqlite.recipe.pairs import load_pairs
from iqlite.recipe.prompts import load_asked, load_prompts
from iqlite.recipe.reading import load_recipe
from iqlite.run.rundir import RunDir, locked
from tests.helpers.tiny import SPECIAL, TEMPLATES, make_tokenizer

RECIPE = """[model]
base = "smollm2-135m-instruct"
[adapter]
rank = 4
alpha = 8.0
[behavior]
wanted = "You are kind."
unwanted = "You are mean."
[prompts]
train = "train.jsonl"
[superior]
estimator = "contrastive"
strength = 1.0
[rollout]
max_new_tokens = 6
[train]
steps = 3
"""
KEYS = [
    "model", "base", "quantization", "thinking", "adapter", "rank", "alpha", "start", "behavior", "wanted", "unwanted", "placement", "mixture",
    "demonstrations", "name", "weight", "user", "prompts", "train", "eval", "dataset", "split", "limit", "label", "superior", "estimator",
    "strength", "clip", "objective", "gamma", "rollout", "temperature", "top_p", "batch", "steps", "epochs", "seed", "judge", "measure",
    "prompt", "messages", "conversations", "role", "content", "from", "value", "chosen", "rejected", "question", "context", "instruction",
    "input", "system", "kind", "group", "category", "text", "type",
]  # fmt: skip
NUMBERS = ["9" * 5000, "-" + "9" * 5000, "0x" + "f" * 5000, "1e999", "-1e999", "NaN", "nan", "inf", "9" * 400, "1" * 400 + ".5", "0", "-1", "1e-320", "18446744073709551616"]  # fmt: skip
PATHS = [
    "~nosuchuser/x", "~nosuchuser", "a\0b", "x" * 300, "/".join(["y" * 200] * 40), "/proc/self/mem", "/dev/null", "/proc/1/root/x", "", ".", "..", "/",
    "//", "~", "C:\\x\\y", "con.toml", "a\nb", "\ud800", "ollama:", "ollama:\0", "ollama:../../x", "lmstudio:", "lmstudio:../..", "a:b", "-o", "*",
    "x.gguf", "..gguf", "/dev/stdin/x", "file:///etc/passwd", "\u202egnp.toml", "x/" * 3000,
]  # fmt: skip

texts = st.one_of(st.text(max_size=40), st.sampled_from([*SPECIAL, *PATHS, "\ud800", "\0", "<think>", '"""', "{{ x }}"]))
names = st.one_of(st.sampled_from(KEYS), st.text(max_size=8))


@dataclass(frozen=True)
class Raw:
    """A number as it is spelled, which Python itself may not be able to spell."""

    text: str


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.sampled_from(NUMBERS).map(Raw))
values = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=5)), max_leaves=12
)


def as_json(value: Any) -> str:
    """JSON, numbers as they are spelled."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {as_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_json, value)) + "]"
    return json.dumps(value)


def as_toml(value: Any) -> str:
    """TOML, in a line."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return '"none"' if value is None else json.dumps(value)


edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["flip", "cut", "insert", "repeat"]), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)  # fmt: skip


def edited(good: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """Bytes changed at some places: flipped, cut off, put in, repeated."""
    for share, how, with_what in changes:
        at = int(share * len(good))
        if how == "flip":
            good = good[:at] + with_what + good[at + len(with_what) :]
        elif how == "cut":
            good = good[:at]
        elif how == "insert":
            good = good[:at] + with_what + good[at:]
        else:
            good = good[:at] + good[max(0, at - 8) : at] * 3 + good[at:]
    return good


# --- what is written, by kind

lines = st.lists(st.one_of(values.map(as_json), texts, st.sampled_from(["[" * 3000, '{"prompt":' * 2000, '[{"role": "user", "content": 1}]'])), max_size=6)  # fmt: skip
tables = st.dictionaries(names, st.one_of(values, st.dictionaries(names, values, max_size=4)), max_size=5)


def _recipe_text(given: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(key)} = {as_toml(value)}\n" for key, value in given.items()) + RECIPE


recipes = st.one_of(
    tables.map(_recipe_text).map(lambda text: text.encode("utf-8", "surrogatepass")),
    edits.map(lambda changes: edited(RECIPE.encode(), changes)),
    st.tuples(names, values).map(lambda one: RECIPE.replace("rank = 4", f"{json.dumps(one[0])} = {as_toml(one[1])}").encode("utf-8", "surrogatepass")),
    st.tuples(st.sampled_from(["rank = 4", "alpha = 8.0", "steps = 3", "strength = 1.0", "max_new_tokens = 6", 'wanted = "You are kind."', 'train = "train.jsonl"', 'base = "smollm2-135m-instruct"']), values).map(
        lambda one: RECIPE.replace(one[0], f"{one[0].partition(' =')[0]} = {as_toml(one[1])}").encode("utf-8", "surrogatepass")),
    st.sampled_from([b"a = [" * 3000, b"[" * 4000, b"\xff\xfe", b"a.b" * 3000, b"x = " + b"9" * 5000, b"[a]\n" * 2]),
)  # fmt: skip
overrides = st.one_of(texts, st.tuples(st.lists(names, min_size=1, max_size=3).map(".".join), values.map(as_toml)).map("=".join), st.tuples(st.sampled_from(["train.steps", "adapter.rank", "model.base", "rollout.batch", "superior.strength", "prompts.train"]), values.map(as_toml)).map("=".join))  # fmt: skip
prompt_files = st.tuples(st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".parquet", ".md"]), st.one_of(lines.map("\n".join).map(lambda t: t.encode("utf-8", "surrogatepass")), values.map(as_json).map(lambda t: t.encode("utf-8", "surrogatepass")), st.binary(max_size=200)))  # fmt: skip
pair_rows = st.fixed_dictionaries(
    {"prompt": st.one_of(texts, values), "chosen": st.one_of(texts, values), "rejected": st.one_of(texts, values)}
)
pair_files = st.lists(st.one_of(pair_rows.map(as_json), values.map(as_json)), max_size=3).map("\n".join)
safety_rows = st.fixed_dictionaries({"kind": st.one_of(st.sampled_from(["harmful", "harmless", "group"]), values), "prompt": st.one_of(texts, values)}, optional={"group": values})  # fmt: skip
safety_files = st.lists(st.one_of(safety_rows.map(as_json), values.map(as_json)), max_size=3).map("\n".join)
asked_files = tables.map(lambda given: "".join(f"{json.dumps(key)} = {as_toml(value)}\n" for key, value in given.items()))


@cache
def good_gguf() -> bytes:
    """A GGUF file of a Llama of one layer, of 4 numbers a vector."""
    path = Path(os.environ.get("IQLITE_CACHE", ".")) / f"good-{os.getpid()}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    for add, number in ((writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 4), (writer.add_feed_forward_length, 8), (writer.add_head_count, 2), (writer.add_head_count_kv, 1)):  # fmt: skip
        add(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c", "d"])
    shapes = {"token_embd": (4, 4), "output_norm": (4,), "blk.0.attn_norm": (4,), "blk.0.ffn_norm": (4,), "blk.0.attn_q": (4, 4), "blk.0.attn_k": (2, 4), "blk.0.attn_v": (2, 4), "blk.0.attn_output": (4, 4), "blk.0.ffn_gate": (8, 4), "blk.0.ffn_up": (8, 4), "blk.0.ffn_down": (4, 8)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


counts = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]))


def _small_gguf(given: tuple[int, int, int, list[tuple[str, int, int, int, bytes]]]) -> bytes:
    """A header alone: version, counts, and fields whose kinds and lengths may be anything."""
    version, tensors, fields, told = given
    out = b"GGUF" + struct.pack("<IQQ", version, tensors, fields)
    for name, kind, inside, length, rest in told:
        out += struct.pack("<Q", len(name.encode())) + name.encode() + struct.pack("<I", kind)
        out += (struct.pack("<IQ", inside, length) if kind == 9 else b"") + rest
    return out


fields = st.tuples(st.sampled_from(["general.architecture", "llama.block_count", "llama.attention.head_count", "general.type", "x"]), st.integers(0, 13), st.integers(0, 13), counts, st.binary(max_size=24))  # fmt: skip
gguf_headers = st.one_of(
    edits.map(lambda changes: edited(good_gguf(), changes)),
    st.tuples(st.integers(0, 4), st.one_of(st.integers(0, 3), counts), st.one_of(st.integers(0, 5), counts), st.lists(fields, max_size=4)).map(_small_gguf),
    st.tuples(st.floats(0, 0.5), counts).map(lambda one: edited(good_gguf(), [(one[0], "flip", struct.pack("<Q", one[1]))])),
)  # fmt: skip


@cache
def good_safetensors() -> bytes:
    """Two tensors."""
    return bytes(save({"model.a.lora_A.weight": torch.zeros(2, 2), "model.a.lora_B.weight": torch.zeros(2, 2)}))


def _with_header(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data + bytes(32)


offsets = st.lists(st.one_of(st.integers(-5, 40), st.sampled_from([2**63, 2**64])), max_size=3)
tensors = st.dictionaries(texts, st.one_of(values, st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "F16", "U8", "F8_E4M3", "??"]), "shape": st.lists(st.integers(-2, 2**40), max_size=3), "data_offsets": offsets})), max_size=3)  # fmt: skip
safetensors_files = st.one_of(edits.map(lambda changes: edited(good_safetensors(), changes)), tensors.map(as_json).map(_with_header), st.tuples(counts, st.binary(max_size=50)).map(lambda one: struct.pack("<Q", one[0]) + one[1]))  # fmt: skip
TRAVERSALS = ["../secret.safetensors", "/etc/passwd", "a/../../b", "..", ".", "", "C:\\x", "..\\x", "model.safetensors", "a\0b", "~/x"]
indexes = st.one_of(values.map(as_json), st.dictionaries(texts, st.one_of(st.sampled_from(TRAVERSALS), values), max_size=4).map(lambda found: as_json({"weight_map": found})), edits.map(lambda c: edited(b'{"weight_map": {"a": "model.safetensors"}}', c).decode("latin-1")))  # fmt: skip

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024, "tie_word_embeddings": False, "head_dim": 16,
}  # fmt: skip
configs = st.one_of(
    st.tuples(st.sampled_from([*CONFIG, "layer_types", "rope_parameters"]), values).map(lambda one: as_json(CONFIG | {one[0]: one[1]})),
    st.tuples(st.sampled_from(["qwen3", "gemma2", "mixtral", "lfm2", "t5", "bert", "nosuchmodel", "../x"]), values).map(lambda one: as_json(CONFIG | {"model_type": one[0], "layer_types": one[1]})),
    edits.map(lambda changes: edited(json.dumps(CONFIG).encode(), changes).decode("latin-1")),
    values.map(as_json),
    st.sampled_from(["[" * 5000, "{" * 10, ""]),
)  # fmt: skip
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
adapters = st.tuples(st.one_of(st.tuples(names, values).map(lambda one: as_json(LORA | {one[0]: one[1]})), st.tuples(st.sampled_from([*LORA, "use_dora", "init_lora_weights", "modules_to_save"]), values).map(lambda one: as_json(LORA | {one[0]: one[1]})), values.map(as_json)), safetensors_files)  # fmt: skip
environments = st.one_of(values.map(as_json), st.tuples(st.sampled_from(["format", "base", "prompts", "placement"]), values).map(lambda one: as_json({"format": 1, one[0]: one[1]})))  # fmt: skip


@cache
def good_tokenizer() -> dict[str, bytes]:
    """The files of the tests' tokenizer."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


tokenizers = st.tuples(
    st.sampled_from(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]), st.one_of(edits, st.none()), values
)
PIECES = [
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{{ messages }}", "{% if add_generation_prompt %}", "{% endif %}", "{{ bos_token }}",
    "{{ raise_exception('no') }}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}",
    "{% macro x() %}{{ x() }}{% endmacro %}{{ x() }}", "{{ messages[99].content }}", "{% set s = namespace(x='a') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x ~ 'b' if s.x|length < 10000 else s.x %}{% endfor %}",
    "{{ tools|length }}", "{{ nothing.at.all }}", "<|im_start|>", "<|im_end|>", '"""', "{% include '/etc/passwd' %}", "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ '%s' | format(messages) }}", "{% break %}", "{{ strftime_now('%Y') }}", "{% generation %}", "{{ content }}", "}}", "{%",
]  # fmt: skip
templates = st.one_of(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.text(max_size=30), edits.map(lambda changes: edited(str(TEMPLATES["llama3"]).encode(), changes).decode("latin-1")))  # fmt: skip
spelled = st.tuples(st.lists(st.one_of(st.sampled_from([*SPECIAL, "<|im_end|>\n", "hi", " ", "<s", "|>", "\ue0000\ue001"]), st.text(max_size=4)), max_size=6).map("".join), st.sampled_from(["user", "system", "answer", "description", "demonstration"]))  # fmt: skip
places = st.one_of(st.sampled_from(PATHS), st.text(max_size=30), st.lists(st.sampled_from(["..", "x", "~", "\0", "/", "ollama:", ".gguf"]), max_size=5).map("".join))  # fmt: skip


# --- what is made of it


def recipe(folder: Path, data: bytes) -> None:
    (folder / "recipe.toml").write_bytes(data)
    locked(load_recipe(folder / "recipe.toml"))


def setting(folder: Path, text: str) -> None:
    (folder / "recipe.toml").write_text(RECIPE)
    locked(load_recipe(folder / "recipe.toml", [text]))


def prompts(folder: Path, given: tuple[str, bytes]) -> None:
    ending, data = given
    (folder / f"train{ending}").write_bytes(data)
    load_prompts(f"train{ending}", beside=folder, key="prompts.train")


def pairs(folder: Path, text: str) -> None:
    (folder / "pairs.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    load_pairs(folder / "pairs.jsonl")


def safety(folder: Path, text: str) -> None:
    (folder / "safety.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    load_items(folder / "safety.jsonl")


def asked(folder: Path, text: str) -> None:
    (folder / "asked.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    load_asked(folder / "asked.toml")


def gguf_header(folder: Path, data: bytes) -> None:
    (folder / "x.gguf").write_bytes(data)
    shape_of(str(folder / "x.gguf"))


def gguf_conversion(folder: Path, data: bytes) -> None:
    """All that comes before weights are read: also what the gguf library itself reads of a header that passed."""
    (folder / "x.gguf").write_bytes(data)
    find_gguf(str(folder / "x.gguf"))
    told([folder / "x.gguf"], "x")


def gguf_whole(folder: Path, data: bytes) -> None:
    """The conversion to its end; nothing is kept of one that is refused."""
    (folder / "x.gguf").write_bytes(data)
    cache_before = set(Path(os.environ["IQLITE_CACHE"]).iterdir())
    try:
        convert_gguf(folder / "x.gguf", "x")
    finally:
        left = {path.name for path in set(Path(os.environ["IQLITE_CACHE"]).iterdir()) - cache_before}
        assert not any(name.startswith("making") for name in left), left


def safetensors(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    check_files(folder, "x")


def index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").write_bytes(good_safetensors())
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    check_files(folder, "x")


def config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    shape_of(str(folder))


def adapter(folder: Path, given: tuple[str, bytes]) -> None:
    (folder / "adapter_config.json").write_bytes(given[0].encode("utf-8", "surrogatepass"))
    (folder / "adapter_model.safetensors").write_bytes(given[1])
    read_config(folder)


def environment(folder: Path, text: str) -> None:
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "environment.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    RunDir.open(folder)


def tokenizer(folder: Path, given: tuple[str, Any, Any]) -> None:
    which, changes, value = given
    for name, data in good_tokenizer().items():
        (folder / name).write_bytes(data)
    old = good_tokenizer().get(which, b"")
    (folder / which).write_bytes(edited(old, changes) if changes else as_json(value).encode("utf-8", "surrogatepass"))
    Chat(read_tokenizer(str(folder), "x"))


def template(_: Path, text: str) -> None:
    made = make_tokenizer()
    made.chat_template = text
    chat = Chat(made)
    chat.ids(({"role": "user", "content": "hi"},), Description("Be kind.", (("a", "b"),)))


@cache
def plain_chat() -> Chat:
    return Chat(make_tokenizer())


def control(_: Path, given: tuple[str, str]) -> None:
    """Control tokens stay text wherever they are spelled: there are as many as without them, and nothing is lost."""
    text, where = given
    chat, hello = plain_chat(), {"role": "user", "content": "hi"}
    text = text.replace("\ue000", "").replace("\ue001", "").strip()
    if not text:
        return

    def ids(said: str) -> list[int]:
        turns: dict[str, tuple[dict[str, str], ...]] = {"user": ({"role": "user", "content": said},), "system": ({"role": "system", "content": said}, hello), "answer": (hello, {"role": "assistant", "content": said}, hello)}  # fmt: skip
        if where in turns:
            return chat.ids(turns[where])
        return chat.ids((hello,), Description(said) if where == "description" else Description("Be.", ((said, said),)))

    special = set(chat.tokenizer.all_special_ids)
    found, expected = ids(text), ids("x")
    assert [i for i in found if i in special] == [i for i in expected if i in special], (text, where)
    assert text in chat.tokenizer.decode(found), (text, where)


def path(folder: Path, text: str) -> None:
    path_of(text, folder)
    find_gguf(text, folder)
    there(prompts=Path(text))
    load_recipe(Path(text))


def base_name(folder: Path, text: str) -> None:
    shape_of(text, folder)


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Path, Any], None]]] = {
    "recipes": (recipes, recipe),
    "--set": (overrides, setting),
    "prompt files": (prompt_files, prompts),
    "pair files": (pair_files, pairs),
    "safety files": (safety_files, safety),
    "--prompts tables": (asked_files, asked),
    "GGUF headers": (gguf_headers, gguf_header),
    "GGUF headers, as converted": (gguf_headers, gguf_conversion),
    "GGUF conversions": (gguf_headers, gguf_whole),
    "safetensors headers": (safetensors_files, safetensors),
    "safetensors indexes": (indexes, index),
    "configurations": (configs, config),
    "adapters": (adapters, adapter),
    "environments": (environments, environment),
    "tokenizers": (tokenizers, tokenizer),
    "templates": (templates, template),
    "control tokens": (spelled, control),
    "paths": (places, path),
    "names of bases": (places, base_name),
}
"""Kind → (what is made up, what reads it). A reader returns, or raises an IqliteError; anything else is a fault of ours."""


def files(folder: Path) -> dict[str, int]:
    """Every file below a folder and its size."""
    return {str(one.relative_to(folder)): one.stat().st_size for one in folder.rglob("*") if one.is_file()}


def long_line(size: int) -> bytes:
    """A prompt file of one line of so many bytes."""
    out = io.BytesIO()
    out.write(b'{"prompt": "')
    out.write((b"word " * (size // 5 + 1))[:size])
    out.write(b'"}\n{"prompt": "short"}\n')
    return out.getvalue()
