"""The one decoding loop against the naive way: no cache, no padding, no batch, each position a forward over all that was said so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iqlite.chat.superior import superior_answers
from iqlite.model import decoding
from iqlite.model.head import Head
from iqlite.model.sampling import Sampler, choose, noise
from iqlite.records import Messages, Rollout
from iqlite.training.session import Session
from tests.helpers import oracle
from tests.helpers.tiny import ARCHITECTURES

SHOWN = (
    {"user": "Breakfast?", "wanted": "Bread, how lovely, and tea with it!", "unwanted": "Bread."},
    {"user": "And then?", "wanted": "A walk.", "unwanted": "Nothing, as on every single day of the week."},
)  # the readings' demonstrations are of different lengths on purpose
PLAIN: tuple[Messages, ...] = tuple(({"role": "user", "content": text},) for text in ("why?", "tell me more about it", "so"))
ODD: Messages = ({"role": "system", "content": "Be brief."}, *PLAIN[0])  # doesn't begin as the others do: it can't share
ENDS = tuple(range(0, 256, 5))  # a fifth of all bytes end a turn, so that rows end early and apart


@contextmanager
def read_by(session: Session) -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens a row) of each forward of the base in the block."""
    found: list[tuple[int, int]] = []

    def note(_: object, __: object, options: dict[str, torch.Tensor]) -> None:
        found.append(tuple(options["input_ids"].shape))  # type: ignore[arg-type]

    hook = session.policy.forward.decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def answers(rollout: Rollout) -> list[list[int]]:
    return [rollout.response_ids(row) for row in range(len(rollout.index))]


def naively(session: Session, request: Messages, number: int, sampler: Sampler) -> list[int]:
    """One answer of the superior policy by the plain model's own logits and the oracle's equation (3)."""
    by_name = {reading.name: reading.description for reading in session.readings}
    prompts = [session.chat.ids(request, by_name[name]) for name in ("reference", "wanted", "unwanted")]
    answer: list[int] = []
    with session.policy.acting_as("reference"):
        for position in range(sampler.max_new_tokens):
            said = [session.policy.model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, -1].double().tolist() for ids in prompts]
            log_superior = oracle.superior(said[0], [(1.0, said[1], said[2])], 3.0, 5.0, 1e-4)
            uniform = noise(sampler.seed, sampler.stream, 0, [number], position)
            answer.append(int(choose(torch.tensor([log_superior]), uniform, sampler.temperature, sampler.top_p)))
            if answer[-1] in session.chat.stop_ids:
                break
    return answer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_superior_answers_are_the_naively_drawn_ones(
    architecture: str, make_session: Callable[..., Session], tiny: Callable[..., Path]
) -> None:
    """Readings share their demonstrations, of different lengths, and one row shares nothing; Gemma-2's window of 64 lets none share."""
    session = make_session(model={"base": str(tiny(architecture))}, behavior={"demonstrations": SHOWN})
    requests = (*PLAIN, ODD)
    prefixes = {len(session.chat.shared(reading.description)) for reading in session.readings if reading.description}
    assert len(prefixes) == 2
    for temperature in (0.0, 1.0):
        sampler = Sampler(3, 6, temperature)
        with read_by(session) as read:
            found = superior_answers(session, requests, sampler)
        assert prefixes <= {tokens for rows, tokens in read if rows == 1} or architecture == "gemma2" or temperature == 1.0
        assert answers(found) == [naively(session, request, number, sampler) for number, request in enumerate(requests)]
        session.policy.forward.steady = True  # as on a card, see test_steady
        assert answers(superior_answers(session, requests, sampler)) == answers(found)
        session.policy.forward.steady = False


def test_rows_that_have_ended_leave_and_nothing_changes(make_session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(behavior={"demonstrations": SHOWN}, rollout={"max_new_tokens": 24})
    session = replace(session, sizes=replace(session.sizes, rows=64, rollout_tokens=100_000))  # all in one batch
    session.chat.stop_ids = ENDS
    requests = [({"role": "user", "content": "why? " * (1 + number % 3)},) for number in range(10)]
    sampler = Sampler(0, 24)
    ways: dict[str, Callable[[], Rollout]] = {
        "superior": lambda: superior_answers(session, requests, sampler),
        "policy": lambda: session.answers("policy", requests, sampler),
    }
    for who, draw in ways.items():
        found = {}
        for leave_at in (-1.0, 0.75, 1.0):  # never, as it is, at every token
            monkeypatch.setattr(decoding, "LEAVE_AT", leave_at)
            with read_by(session) as read:
                found[leave_at] = answers(draw())
            rows = [rows for rows, tokens in read if tokens == 1]
            assert (rows[-1] < max(rows)) == (leave_at > 0)
        assert found[-1.0] == found[0.75] == found[1.0], who
        assert len(set(map(len, found[0.75]))) > 2


def test_the_batch_s_split_changes_nothing(make_session: Callable[..., Session]) -> None:
    session = make_session(behavior={"demonstrations": SHOWN})
    requests = (*PLAIN, ODD, *(({"role": "user", "content": "why? " * number},) for number in range(2, 6)))
    sampler = Sampler(1, 8)
    wide = answers(superior_answers(session, requests, sampler))
    for rows in (1, 6, 9):  # one, two and three requests under three readings each
        narrow = replace(session, sizes=replace(session.sizes, rows=rows))
        assert answers(superior_answers(narrow, requests, sampler)) == wide
    turned = superior_answers(session, requests[::-1], sampler, index=range(len(requests))[::-1])
    assert answers(turned)[::-1] == wide


def test_a_prefix_is_read_once_a_reading_and_not_once_a_row(make_session: Callable[..., Session]) -> None:
    """Demonstrations cost one row; the base's weights don't move, so that the next answers don't read them again."""
    session = make_session(behavior={"demonstrations": SHOWN})
    starts = {reading.name: session.chat.shared(reading.description) for reading in session.readings}
    prompts = [(session.chat.ids(request, r.description), starts[r.name]) for r in session.readings for request in PLAIN]
    rests = max(len(ids) - len(start) for ids, start in prompts)
    sampler = Sampler(0, 3)
    session.chat.stop_ids = (session.chat.turn_end,)
    with read_by(session) as read:
        superior_answers(session, PLAIN, sampler)
    *prefixes, prompt = read[: len([start for start in starts.values() if start]) + 1]
    assert sorted(prefixes) == sorted((1, len(start)) for start in starts.values() if start)
    assert prompt == (len(PLAIN) * len(starts), rests) and rests < min(len(starts["wanted"]), len(starts["unwanted"]))
    with read_by(session) as again:
        superior_answers(session, PLAIN, sampler)
    assert again[0] == prompt and all(tokens == 1 for _, tokens in again[1:])
    with read_by(session) as alone:  # the policy's weights move: its prefix is read for every batch of more than one row
        session.answers("policy", PLAIN, sampler, description=session.wanted)
        session.answers("policy", PLAIN[:1], sampler, description=session.wanted)
    shared = len(session.chat.shared(session.wanted))
    assert alone[0] == (1, shared) and (1, shared) not in alone[1:]


def test_out_of_memory_with_one_request_says_so_and_with_more_halves(
    make_session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All readings of a request are decoded together: one request is the least there can be."""
    from iqlite.errors import BaseError

    session = make_session()
    sampler = Sampler(0, 4)
    expected = answers(superior_answers(session, PLAIN, sampler))
    plain_head = session.policy.head.__class__.__call__

    def small(most: int) -> None:
        def call(self: Head, hidden: torch.Tensor) -> torch.Tensor:
            if len(hidden) > most:
                raise torch.OutOfMemoryError("no room")
            logits: torch.Tensor = plain_head(self, hidden)
            return logits

        monkeypatch.setattr(session.policy.head.__class__, "__call__", call)

    small(1)
    assert answers(superior_answers(session, PLAIN, sampler)) == expected
    small(0)
    with pytest.raises(BaseError, match="one row at a time"):
        superior_answers(session, PLAIN, sampler)
