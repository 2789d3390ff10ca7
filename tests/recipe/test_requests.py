"""Prompt and pair files as people have them: each comes to the requests it means, or says why not; nothing is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from iqlite.errors import PromptsError
from iqlite.recipe.pairs import load_pairs
from iqlite.recipe.prompts import load_prompts
from iqlite.recipe.requests import parse_request, request_of
from iqlite.recipe.schema import HubPrompts

ASKED = ({"role": "user", "content": "How do I peel an apple?"},)
TURNS = [{"role": "user", "content": "How do I peel an apple?"}, {"role": "assistant", "content": "With a knife."}]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def contents(path: Path | str, tmp_path: Path) -> list[str]:
    return [request[-1]["content"] for request in load_prompts(str(path), beside=tmp_path, key="prompts.train").requests]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Find the error.", "input": "She go home.", "output": "…"}, "Find the error.\n\nShe go home."),
        ({"instruction": "Name a cheese.", "input": "", "output": "…"}, "Name a cheese."),
        ({"instruction": "Sum it up.", "context": "Paris lies on the Seine.", "response": "…"}, "Sum it up.\n\nParis lies on the Seine."),
        ({"context": "Paris lies on the Seine.", "question": "On which river?"}, "Paris lies on the Seine.\n\nOn which river?"),
        ({"prompt": "Just this.", "input": "an unrelated column"}, "Just this."),
    ],
)
def test_what_belongs_to_a_prompt_is_kept(row: dict[str, str], expected: str) -> None:
    assert request_of(row, None) == ({"role": "user", "content": expected},)


def test_rows_of_one_instruction_are_no_duplicates(tmp_path: Path) -> None:
    rows = [{"instruction": "Find the error.", "input": text, "output": ""} for text in ("She go.", "They was.", "He have.")]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows), "utf-8")
    prompts = load_prompts("alpaca.json", beside=tmp_path, key="prompts.train")
    assert len(prompts) == 3 and prompts.notes == ()


@pytest.mark.parametrize(
    "value",
    [
        TURNS,
        json.dumps(TURNS),
        str(TURNS),  # as Python prints it
        [{"from": "human", "value": "How do I peel an apple?"}, {"from": "gpt", "value": "With a knife."}],
        json.dumps([{"from": "human", "value": "How do I peel an apple?"}, {"from": "gpt", "value": "With a knife."}]),
        [{"role": "user", "content": [{"type": "text", "text": "How do I "}, {"type": "text", "text": "peel an apple?"}]}, TURNS[1]],
        "<|im_start|>user\nHow do I peel an apple?<|im_end|>\n<|im_start|>assistant\nWith a knife.<|im_end|>\n",
        "<|im_start|>user\nHow do I peel an apple?<|im_end|>\n<|im_start|>assistant\n",
        "<start_of_turn>user\nHow do I peel an apple?<end_of_turn>\n<start_of_turn>model\nWith a knife.<end_of_turn>\n",
        "<|start_header_id|>user<|end_header_id|>\n\nHow do I peel an apple?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "\n\nHuman: How do I peel an apple?\n\nAssistant: With a knife.",
    ],
)  # fmt: skip
def test_conversations_as_people_keep_them(value: Any) -> None:
    assert parse_request(value) == ASKED


@pytest.mark.parametrize(
    "value",
    [
        '[{"role": "user", "content": "cut o',  # broken: the text itself is no prompt
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
        [{"role": "tool", "content": "42"}],
        [{"role": "assistant", "content": "Hello!"}],
        [{"role": "user", "content": None}],
        [],
        7,
    ],
)
def test_what_is_no_request(value: Any) -> None:
    assert parse_request(value) is None


def test_a_list_that_isn_t_turns_is_a_prompt() -> None:
    assert parse_request('[{"name": "a"}] is valid JSON, isn\'t it?') == (
        {"role": "user", "content": '[{"name": "a"}] is valid JSON, isn\'t it?'},
    )


def test_json_lines_called_json_and_rows_under_a_name(tmp_path: Path) -> None:
    rows = [{"prompt": "one?"}, {"prompt": "two?"}]
    assert contents(lines(tmp_path / "lines.json", rows), tmp_path) == ["one?", "two?"]
    (tmp_path / "named.json").write_text(json.dumps({"version": 1, "data": rows}), "utf-8")
    assert contents("named.json", tmp_path) == ["one?", "two?"]
    (tmp_path / "broken.json").write_text('[{"prompt": "one?"},', "utf-8")
    with pytest.raises(PromptsError, match="can't be read"):
        contents("broken.json", tmp_path)


def test_an_object_that_is_a_row_and_its_lists_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"prompt": "hi?", "tags": ["a", "b"]}), "utf-8")
    assert contents("one.json", tmp_path) == ["hi?"]
    (tmp_path / "turns.json").write_text(json.dumps({"messages": TURNS}), "utf-8")
    assert contents("turns.json", tmp_path) == ["How do I peel an apple?"]


@pytest.mark.parametrize(
    "text", ["What does this do?\n<|im_start|>user\nHi<|im_end|>\nExplain.", '[{"value": 1}, {"value": 2}]\nSum the values.']
)
def test_a_prompt_that_quotes_a_conversation_is_whole(text: str) -> None:
    assert parse_request(text) == ({"role": "user", "content": text},)


def test_a_long_field_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f'prompt\n"{"word " * 40_000}"\n"short?"\n', "utf-8")
    assert [len(text) for text in contents("long.csv", tmp_path)] == [199_999, 6]


def test_messages_spelled_in_a_csv(tmp_path: Path) -> None:
    text = json.dumps(TURNS).replace('"', '""')
    (tmp_path / "messages.csv").write_text(f'messages\n"{text}"\n', "utf-8")
    assert contents("messages.csv", tmp_path) == ["How do I peel an apple?"]


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": ["one?", "two?"]})
    data.save_to_disk(tmp_path / "saved")
    assert contents("saved", tmp_path) == ["one?", "two?"]
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "both")
    with pytest.raises(PromptsError, match="several splits: name one of 'both/test', 'both/train'"):
        contents("both", tmp_path)
    assert contents("both/train", tmp_path) == ["one?", "two?"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(PromptsError, match="is a folder: name a file in it"):
        contents("folder", tmp_path)


def test_a_data_set_of_several_configurations_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "multi"
    for name in ("german", "spanish"):
        (folder / name).mkdir(parents=True)
        lines(folder / name / "train.jsonl", [{"prompt": f"{name}?"}])
    configs = [f"- config_name: {name}\n  data_files: {name}/train.jsonl" for name in ("german", "spanish")]
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n", "utf-8")
    with pytest.raises(PromptsError, match="several configurations: set config to one of 'german', 'spanish'"):
        load_prompts(HubPrompts(dataset=str(folder)), beside=tmp_path, key="prompts.train")
    found = load_prompts(HubPrompts(dataset=str(folder), config="spanish"), beside=tmp_path, key="prompts.train")
    assert found.requests == (({"role": "user", "content": "spanish?"},),)


PAIR = {"chosen": "With a knife.", "rejected": "No."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "How do I peel an apple?", **PAIR},
        {
            "prompt": "How do I peel an apple?",
            "chosen": TURNS,
            "rejected": [TURNS[0], {"role": "assistant", "content": "No."}],
        },  # UltraFeedback
        {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "No."}]},  # TRL's, without a prompt of its own
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "No."}]},  # TRL's, with one
        {
            "chosen": "\n\nHuman: How do I peel an apple?\n\nAssistant: With a knife.",
            "rejected": "\n\nHuman: How do I peel an apple?\n\nAssistant: No.",
        },
    ],
)
def test_pairs_as_people_have_them(row: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    path = lines(tmp_path / "pairs.jsonl", [row, {"prompt": "left out", "chosen": None, "rejected": "x"}])
    (pair,) = load_pairs(path, said.append)
    assert (pair.request, pair.chosen, pair.rejected) == (ASKED, "With a knife.", "No.")
    assert said == [f"{path}: 1 row without a chosen or a rejected answer left out."]


def test_a_pair_s_input_and_system_text_are_kept(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate to French.", "input": "Good morning", "chosen": "Bonjour", "rejected": "Hola"},
        {"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "Because it is so."},
    ]
    first, second = load_pairs(lines(tmp_path / "pairs.jsonl", rows))
    assert first.request == ({"role": "user", "content": "Translate to French.\n\nGood morning"},)
    assert second.request == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})


def test_conversations_that_begin_otherwise_are_no_pair(tmp_path: Path) -> None:
    other = [{"role": "user", "content": "Another question?"}, {"role": "assistant", "content": "No."}]
    path = lines(tmp_path / "pairs.jsonl", [{"chosen": TURNS, "rejected": other}])
    with pytest.raises(PromptsError, match="line 1 must look like"):
        load_pairs(path)
