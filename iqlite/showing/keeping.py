"""Token rewards of a run's held-out answers, kept in it, so that a second report needs no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

from iqlite.run.files import read_json
from iqlite.run.findings import REWARDS, adapter_digest
from iqlite.run.rundir import RunDir
from iqlite.showing.gathering import held_out
from iqlite.showing.heat import Heat, Token, heat, token_text
from iqlite.showing.report import Words
from iqlite.training.opening import open_run

MOVED = 20  # words that the target says more, and less, often
TOP = 5  # alternatives of a token


def words_of(run: RunDir, count: int, say: Callable[[str], None]) -> Words:
    """Held-out answers of base and trained model with every token's rewards: those kept, else drawn, read and kept in rewards.json."""
    mine = adapter_digest(run.trained())
    if (run.path / REWARDS).is_file():
        kept = read_json(run.path / REWARDS)
        if kept.get("adapter_sha256") == mine and kept.get("count") == count:
            return Words(
                [_heat(one) for one in kept["answers"]], [tuple(one) for one in kept["more"]], [tuple(one) for one in kept["less"]]
            )
    session = open_run(run, say=say)
    say("answering held-out prompts before and after")
    given = held_out(session, run, count)
    say(f"reading {len(given)} answers")
    heats, shift = heat(session, given, top=TOP)
    more, less = shift.extremes(lambda token: token_text(session, token), MOVED)
    record = {"adapter_sha256": mine, "count": count, "answers": [asdict(one) for one in heats], "more": more, "less": less}
    run.write(REWARDS, json.dumps(record, ensure_ascii=False) + "\n")
    return Words(heats, more, less)


def _heat(kept: dict) -> Heat:  # type: ignore[type-arg]
    def token(one: dict) -> Token:  # type: ignore[type-arg]
        tops = {role: tuple((text, p) for text, p in rows) for role, rows in one["alternatives"].items()}
        return Token(**{**one, "alternatives": tops})

    return Heat(kept["prompt"], kept["who"], tuple(token(one) for one in kept["tokens"]))
