"""Which answers are looked at: held-out ones of base and policy, those that training kept, one prompt's, or a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from iqlite.evaluation.answers import Answerer, collect
from iqlite.model.sampling import SPOKEN_TEMPERATURE, SPOKEN_TOP_P, Sampler
from iqlite.records import Messages
from iqlite.run.findings import adapter_digest
from iqlite.run.rundir import RunDir
from iqlite.training.order import spread, spread_by_kind
from iqlite.training.session import Session

BEFORE, AFTER, TARGET, TEXT = "before", "after", "target", "text"
Given = tuple[str, Messages, list[int]]
"""(who answered, the request, the answer's ids)."""


def ids_of(session: Session, text: str, ended: bool) -> list[int]:
    """An answer's ids, with the end of its turn where it ended."""
    ids: list[int] = session.chat.tokenizer(text, add_special_tokens=False).input_ids
    return [*ids, session.chat.turn_end] if ended else ids


def held_out(
    session: Session, run: RunDir | None, count: int, which: str = "adapter", progress: Callable[[int], None] = lambda _: None
) -> list[Given]:
    """Answers of the base and, with a run, of its trained policy, else of the target itself, to evenly spread held-out prompts: as `compare` draws
    them with its first seed, and kept where it keeps them."""
    asked = session.asked
    index = spread_by_kind(asked, count) if asked.expected and len({*asked.expected}) > 1 else spread(range(len(asked)), count)
    requests = asked.some(index).requests
    who = {BEFORE: Answerer("base", "reference")}
    if run:
        who[AFTER] = Answerer("trained", "policy", of=adapter_digest(run.trained(which)))
    elif session.recipe.superior.estimator != "adapter":
        who[TARGET] = Answerer("superior", "superior")
    sampler = Sampler(0, session.recipe.rollout.max_new_tokens, SPOKEN_TEMPERATURE, SPOKEN_TOP_P, "compare")
    answers = {
        name: collect(session, run.path if run else None, one, requests, [sampler], progress, index=index, strangeness=False)[0]
        for name, one in who.items()
    }
    found = [
        (name, request, ids_of(session, answers[name][row].answer, answers[name][row].ended))
        for row, request in enumerate(requests)
        for name in who
    ]
    return [one for one in found if one[2]]


def samples(session: Session, run: RunDir) -> list[Given]:
    """The held-out answers that training kept: of its first and its last evaluation, drawn at the recipe's temperature."""
    lines = run.lines("samples.jsonl")
    requests = {request[-1]["content"]: request for request in session.asked.requests}
    steps = sorted({line["step"] for line in lines})
    found: list[Given] = []
    for line in lines:
        if line["step"] in (steps[0], steps[-1]):
            who = BEFORE if line["step"] == steps[0] else AFTER
            request: Messages = requests.get(line["prompt"], ({"role": "user", "content": line["prompt"]},))
            found.append((who, request, ids_of(session, line["answer"], False)))
    return sorted((one for one in found if one[2]), key=lambda one: (one[1][-1]["content"], one[0] == AFTER))


def answered(session: Session, request: Messages, *, adapted: bool, seed: int) -> list[Given]:
    """The base's own answer to a request and, with an adapter, the policy's, from the same noise."""
    sampler = Sampler(seed, session.recipe.rollout.max_new_tokens, SPOKEN_TEMPERATURE, SPOKEN_TOP_P, "chat")
    roles = {BEFORE: "reference"} | ({AFTER: "policy"} if adapted else {})
    return [(who, request, session.answers(role, [request], sampler).response_ids(0)) for who, role in roles.items()]


def pairs(heats: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Numbers of answers (prompt, who) that stand side by side: neighbours to the same prompt, the base's and the trained model's or the target's."""
    found: list[list[int]] = []
    for number, (prompt, who) in enumerate(heats):
        last = found[-1] if found else []
        if who in (AFTER, TARGET) and len(last) == 1 and heats[last[0]] == (prompt, BEFORE):
            last.append(number)
        else:
            found.append([number])
    return found
