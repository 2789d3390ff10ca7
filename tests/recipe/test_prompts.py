"""Prompt files of every format, and requests as ids in the style of the known chat templates."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from iqlite.errors import PromptsError
from iqlite.model.template import Chat, Description
from iqlite.recipe.prompts import hold_back, load_prompts
from iqlite.recipe.requests import parse_request
from iqlite.recipe.schema import HubPrompts
from iqlite.records import Messages, Prompts
from iqlite.run.rundir import RunDir
from iqlite.training.session import Session
from tests.helpers.tiny import TEMPLATES, make_tokenizer

HELLO: Messages = ({"role": "user", "content": "Hello?"},)
TURNS: Messages = (
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And now?"},
)
SYSTEM, USER = Description("BE KIND", placement="system"), Description("BE KIND", placement="user")
SHOWN = Description("BE KIND", (("Tea?", "Yes, gladly."),), "system")

# What each family's own documentation prescribes, written by hand: plain, told in the system turn, told in the user turn.
EXPECTED = {
    "llama2": (
        "<s>[INST] Hello? [/INST]",
        "<s>[INST] <<SYS>>\nBE KIND\n<</SYS>>\n\nHello? [/INST]",
        "<s>[INST] BE KIND\n\nHello? [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBE KIND<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nBE KIND\n\nHello?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "vicuna": ("<s>USER: Hello? ASSISTANT:", "<s>BE KIND USER: Hello? ASSISTANT:", "<s>USER: BE KIND\n\nHello? ASSISTANT:"),
    "mistral": ("<s>[INST] Hello? [/INST]", "<s>[INST] BE KIND\n\nHello? [/INST]", "<s>[INST] BE KIND\n\nHello? [/INST]"),
    "qwen2.5": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBE KIND<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nBE KIND\n\nHello?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma": (
        "<s><start_of_turn>user\nHello?<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\nBE KIND\n\nHello?<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\nBE KIND\n\nHello?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "none": ("<s>User: Hello?\n\nAssistant:", "<s>BE KIND\n\nUser: Hello?\n\nAssistant:", "<s>User: BE KIND\n\nHello?\n\nAssistant:"),
}
ADDS_BOS = {"llama2", "llama3", "vicuna", "mistral", "gemma", "none"}
STOPS = {"llama2": "</s>", "llama3": "<|eot_id|>", "vicuna": "</s>", "mistral": "</s>", "qwen2.5": "<|im_end|>", "gemma": "<end_of_turn>", "none": "</s>"}  # fmt: skip


def chat_of(template: str, **options: object) -> Chat:
    return Chat(make_tokenizer(template, adds_bos=template in ADDS_BOS), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", EXPECTED)
def test_requests_are_written_as_the_family_does(template: str) -> None:
    chat = chat_of(template)
    for description, expected in zip((None, SYSTEM, USER), EXPECTED[template], strict=True):
        ids = chat.ids(HELLO, description)
        assert chat.tokenizer.decode(ids) == expected
        assert ids == chat.tokenizer(expected, add_special_tokens=False).input_ids  # special tokens are ids, not text
        assert ids.count(chat.tokenizer.bos_token_id) == (1 if template in ADDS_BOS else 0)
    assert chat.default_template == (template == "none")


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t != "chatml"])
def test_turns_demonstrations_and_a_system_turn_of_the_user_s_own(template: str) -> None:
    chat = chat_of(template)
    text = chat.tokenizer.decode(chat.ids(({"role": "system", "content": "Be brief."}, *TURNS), SHOWN))
    pieces = ["BE KIND", "Be brief.", "Tea?", "Yes, gladly.", "Hello?", "Hi.", "And now?"]
    assert [text.count(piece) for piece in pieces] == [1] * len(pieces)
    assert [text.index(piece) for piece in pieces] == sorted(text.index(piece) for piece in pieces)
    assert chat.describe(TURNS, None) == TURNS


@pytest.mark.parametrize("template", STOPS)
def test_the_stop_set_joins_tokenizer_generation_config_and_template(template: str) -> None:
    chat = chat_of(template, generation_eos=[9, 11])
    ids = chat.tokenizer.convert_tokens_to_ids
    assert set(chat.stop_ids) == {chat.tokenizer.eos_token_id, 9, 11, ids(STOPS[template])}


def test_a_template_that_refuses_the_system_turn_is_said(make_session: Callable[..., Session], tiny: Callable[..., Path]) -> None:
    session = make_session(model={"base": str(tiny("mistral", "mistral"))})
    assert any("takes no system turn" in note for note in session.notes)
    session = make_session(model={"base": str(tiny("gemma", "gemma"))}, behavior={"placement": "auto"})
    assert session.placement == "user" and any("takes no system turn" in note for note in session.notes)
    session = make_session(model={"base": str(tiny("llama", "none"))})
    assert any("has no chat template" in note for note in session.notes)
    assert not any("template" in note for note in make_session().notes)


def test_what_a_recipe_says_in_vain_is_said(make_session: Callable[..., Session], make_run: Callable[..., RunDir], tmp_path: Path) -> None:
    assert not any("rank" in note or "trained on" in note for note in make_session().notes)
    run = make_run()
    session = make_session(adapter={"rank": 7, "start": str(run.adapter)}, model={"base": run.recipe().model.base})
    assert any(f"rank {run.recipe().adapter.rank} and alpha 8: adapter.rank = 7" in note for note in session.notes)
    rows = [{"prompt": text} for text in ("One?", "Two?", "Three?")]
    for name, few in (("train", rows), ("eval", [*rows[1:], {"prompt": "Four?"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    session = make_session(prompts={"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")})
    assert any("2 of 3 held-out prompts (prompts.eval) are trained on too" in note for note in session.notes)


def test_auto_takes_the_placement_that_moves_the_base_more(make_session: Callable[..., Session]) -> None:
    session = make_session(behavior={"placement": "auto"})
    said = next(note for note in session.notes if "moves the base more" in note)
    figures = {key: float(said.rpartition(f"{key} turn ")[2].split(",")[0].split(")")[0]) for key in ("system", "user")}
    assert session.placement == max(figures, key=lambda key: figures[key])
    assert all(r.description is None or r.description.placement == session.placement for r in session.readings)


def test_hh_transcripts_messages_and_strings_are_requests() -> None:
    transcript = "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: And now?\n\nAssistant: Bye."
    assert parse_request(transcript) == TURNS
    assert parse_request(transcript.lstrip()) == TURNS
    assert parse_request([*TURNS, {"role": "assistant", "content": "Bye."}]) == TURNS
    assert parse_request("  Hello? ") == HELLO
    system = {"role": "system", "content": "Be brief."}
    assert parse_request([system, *TURNS]) == (system, *TURNS)
    wrong: Any
    for wrong in (
        7,
        None,
        {},
        [],
        [{"role": "assistant", "content": "Hi."}],
        [*HELLO, *HELLO],
        [{"role": "user", "content": 5}],
        ["Hello?"],
    ):
        assert parse_request(wrong) is None


FIVE = ["One?", "Two?", "Three?", "Four?", "Five, six?"]


def write(path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"prompt": text}) for text in FIVE), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"messages": [{"role": "user", "content": text}]} for text in FIVE]), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([["id", "prompt"], *[[n, text] for n, text in enumerate(FIVE)]])
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"question": FIVE}), path)
    else:
        path.write_text("\r\n".join(FIVE) + "\r\n\r\n", "utf-8")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_every_format_gives_the_same_requests(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"five{suffix}")
    prompts = load_prompts(f"five{suffix}", beside=tmp_path, key="prompts.train")
    assert [request[-1]["content"] for request in prompts.requests] == FIVE
    assert prompts.notes == ()


def test_of_several_named_templates_the_default_one_is_used() -> None:
    tokenizer = make_tokenizer("llama3")
    one = Chat(tokenizer).ids(HELLO)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ bos_token }}tools"}
    several = Chat(tokenizer)
    assert several.ids(HELLO) == one and not several.default_template


def test_a_line_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    """Unicode has more line separators, which stand unescaped inside JSON strings."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "One\u2028and\u0085half?"}\r\n{"prompt": "Two?"}\n', "utf-8")
    prompts = load_prompts("p.jsonl", beside=tmp_path, key="prompts.train")
    assert [request[-1]["content"] for request in prompts.requests] == ["One\u2028and\u0085half?", "Two?"]


def test_several_sources_are_read_after_one_another_without_doubles(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("Two?\nSeven?\n", "utf-8")
    prompts = load_prompts(("a.txt", "b.txt"), beside=tmp_path, key="prompts.train")
    assert [request[-1]["content"] for request in prompts.requests] == [*FIVE, "Seven?"]
    assert prompts.notes == ("'a.txt', 'b.txt': 1 prompt that stood in an earlier source skipped.",)


def test_bad_rows_are_counted_with_their_line_numbers(tmp_path: Path) -> None:
    rows = ['{"prompt": "One?"}', "not json", '{"prompt": ""}', '{"prompt": "One?"}', '{"other": 1}', "", '{"prompt": "Two?"}', "[3]", "4", "x", "y", "z"]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    prompts = load_prompts("rows.jsonl", beside=tmp_path, key="prompts.train")
    assert len(prompts) == 2
    assert prompts.notes == (
        "'rows.jsonl': 7 malformed rows skipped (line 2, 5, 8, 9, 10 and 2 more).",
        "'rows.jsonl': 1 empty row skipped (line 3).",
        "'rows.jsonl': 1 duplicate row skipped (line 4).",
    )


def test_a_data_set_folder_is_read_through_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "hh"
    (folder / "harmless-base").mkdir(parents=True)
    chosen = [f"\n\nHuman: {text}\n\nAssistant: Yes." for text in FIVE]
    (folder / "harmless-base" / "train.jsonl").write_text("\n".join(json.dumps({"chosen": c, "rejected": c}) for c in chosen), "utf-8")
    source = HubPrompts(dataset=str(folder), folder="harmless-base", split="train", limit=4)
    prompts = load_prompts(source, beside=tmp_path, key="prompts.train")
    assert [request[-1]["content"] for request in prompts.requests] == FIVE[:4]
    with pytest.raises(PromptsError, match=r"no column 'nothing'; it has: chosen, rejected"):
        load_prompts(source.model_copy(update={"column": "nothing"}), beside=tmp_path, key="prompts.train")
    with pytest.raises(PromptsError, match=r"no column 'kind'; it has: chosen, rejected"):
        load_prompts(source.model_copy(update={"category": "kind"}), beside=tmp_path, key="prompts.train")
    with pytest.raises(PromptsError, match="can't be read.*check its split"):
        load_prompts(source.model_copy(update={"split": "validation"}), beside=tmp_path, key="prompts.train")
    with pytest.raises(PromptsError, match="hub can't be reached"):
        load_prompts(HubPrompts(dataset="nobody/nothing"), beside=tmp_path, key="prompts.train")


def test_over_long_requests_are_cut_from_the_left_and_counted() -> None:
    chat = chat_of("chatml")
    long = " ".join(f"word{number}" for number in range(60))
    prompts = Prompts((HELLO, ({"role": "user", "content": long},), (*TURNS[:2], {"role": "user", "content": long[:40]})))
    cut = chat.shorten(prompts, 80, "'p.jsonl'", "prompts.train")
    assert cut.notes == ("'p.jsonl': 2 of 3 prompts were cut from the left to 80 tokens.",)
    assert cut.requests[0] == HELLO
    assert len(chat.ids(cut.requests[1])) == 80
    assert long.endswith(cut.requests[1][0]["content"])  # the end of the request is what is asked
    assert cut.requests[2] == ({"role": "user", "content": long[:40]},)  # earlier turns go first
    with pytest.raises(PromptsError, match="all 1 prompts are longer than 30 tokens.*prompts.max_tokens"):
        chat.shorten(Prompts((({"role": "user", "content": long},),)), 30, "'p.jsonl'", "prompts.train")


def test_a_tenth_is_held_back_where_no_eval_is_given() -> None:
    requests = tuple(({"role": "user", "content": str(n)},) for n in range(25))
    train, held = hold_back(Prompts(requests), "prompts.train")
    assert len(held) == 2 and len(train) == 23 and not set(map(str, held.requests)) & set(map(str, train.requests))
    assert not train.labels
    train, held = hold_back(Prompts(requests, (), tuple(str(n) for n in range(25))), "prompts.train")
    for part in (train, held):
        assert part.labels == tuple(request[0]["content"] for request in part.requests)
    train, held = hold_back(Prompts(requests[:2]), "prompts.train")
    assert (len(train), len(held)) == (1, 1)
    with pytest.raises(PromptsError, match="one prompt only"):
        hold_back(Prompts(requests[:1]), "prompts.train")


def test_pieces_add_up_to_the_text_and_no_character_is_torn() -> None:
    chat = Chat(make_tokenizer())
    ids = chat.tokenizer("Zoë said: “naïve” 👍!").input_ids
    pieces = chat.pieces(ids)
    assert "".join(pieces) == "Zoë said: “naïve” 👍!" and len(pieces) == len(ids) and "\ufffd" not in "".join(pieces)


def test_text_of_an_answer_has_no_special_tokens() -> None:
    chat = chat_of("llama3")
    ids = chat.tokenizer("Hi there.<|eot_id|>", add_special_tokens=False).input_ids
    assert chat.text(ids) == "Hi there."
