"""The thread that owns the model: it takes answers from a bounded queue and decodes those that are asked alike as one batch."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from iqlite.device import is_out_of_memory, let_go
from iqlite.machine.sizes import Sizes
from iqlite.method.loss import logps_by_chunks
from iqlite.model.decoding import draw
from iqlite.model.sampling import Sampler
from iqlite.serving.answer import Answer, Done, Settings, Token
from iqlite.serving.faults import ApiError, busy
from iqlite.serving.voices import POLICY, Voice, Voices
from iqlite.training.readings import batches
from iqlite.training.rollout import FOLD_FROM

TOGETHER_S, LONGEST_S = 0.005, 0.1  # how long the first answer of a batch waits for others, and at most while others are being read in
EVERY = 4  # tokens that a card draws between two looks of the host; our choice
FULL = ApiError(503, "memory is full: ask for fewer tokens, or with a shorter conversation.", code="out_of_memory")
CLOSING = ApiError(503, "the server is closing.", code="closing")


class Batcher:
    """The queue and its thread. `room` is how many answers may wait; `entering` counts those that are on their way into it.

    `model` is held while the model answers: its roles are nobody else's then.
    """

    def __init__(self, voices: Voices, sizes: Sizes, *, room: int):
        self.voices, self.sizes, self.room = voices, sizes, room
        self.queue: list[Answer] = []
        self.entering = 0
        self.tokens = 0  # drawn since the start
        self.model = threading.Lock()
        self._more = threading.Condition()
        self._closing = False
        self._rows = sizes.rows
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def enter(self, rows: int) -> None:
        """A request for so many answers begins; ApiError 429 where they'd find no room. `put` or `leave` follows."""
        with self._more:
            if len(self.queue) + self.entering + rows > self.room:
                raise busy(len(self.queue))
            self.entering += rows

    def leave(self, rows: int) -> None:
        """The request won't be put."""
        with self._more:
            self.entering -= rows
            self._more.notify_all()

    def put(self, answers: Sequence[Answer]) -> None:
        """Queues a request's answers."""
        with self._more:
            self.entering -= len(answers)
            self.queue += answers
            closing = self._closing
            self._more.notify_all()
        if closing:
            self.close()

    def close(self) -> None:
        """Refuses what waits, ends what is drawn, and waits for the thread."""
        with self._more:
            self._closing = True
            left, self.queue = self.queue, []
            self._more.notify_all()
        for answer in left:
            answer.fail(CLOSING)
        self._thread.join(timeout=60)

    def _run(self) -> None:
        while batch := self._next():
            try:
                with self.model:
                    self._answer(batch)
            except Exception as error:  # noqa: BLE001 - one batch's fault must not silence the server
                self._failed(batch, error)

    def _next(self) -> list[Answer]:
        """The answers that begin now: the one that waits longest, and others with its settings; none when the server closes."""
        with self._more:
            while True:
                self.queue = [answer for answer in self.queue if not answer.gone()]
                if self._closing:
                    return []
                if self.queue:
                    break
                self._more.wait()
            deadline = time.monotonic() + LONGEST_S
            self._more.wait(TOGETHER_S)
            while self.entering and (left := deadline - time.monotonic()) > 0 and not self._closing:
                self._more.wait(left)
            batch: list[Answer] = []
            if not self.queue:  # it was closed meanwhile
                return []
            readings = len(self.queue[0].ids)
            for answer in self.queue:
                longest = max([answer.length, *(one.length for one in batch)])
                fits = len(batch) < max(1, min(self._rows, self.sizes.together(longest) // readings))
                if answer.settings == self.queue[0].settings and fits:
                    batch.append(answer)
            taken = {id(answer) for answer in batch}
            self.queue = [answer for answer in self.queue if id(answer) not in taken]
        return batch

    def _answer(self, batch: Sequence[Answer]) -> None:
        settings = batch[0].settings
        voice = self.voices.by_name[settings.voice]
        scaled = settings.scale != 1 and voice.name == POLICY
        if scaled:
            self.voices.policy.scale_adapter(settings.scale)
        try:
            if any(answer.echo for answer in batch):
                self._echo([answer for answer in batch if answer.echo], voice)
            drawing = [answer for answer in batch if not answer.ended]
            if drawing:
                self._draw(drawing, voice, settings)
            for answer in batch:
                if answer.rewards and not answer.gone():
                    self._reward(answer)
        finally:
            if scaled:
                self.voices.policy.scale_adapter(1.0)

    def _draw(self, batch: Sequence[Answer], voice: Voice, settings: Settings) -> None:
        new = max(answer.longest for answer in batch)
        predict, seen, stops = self.voices.predictor(voice, settings.strength), Seen(), self.voices.chat.stop_ids
        prompts = {name: [answer.ids[name] for answer in batch] for name in voice.readings}
        sampler = Sampler(0, new, settings.temperature, settings.top_p, "serve")
        numbers = [answer.number for answer in batch]

        def noted(states: Mapping[str, Tensor]) -> Tensor:
            seen.logits_bV = predict(states)
            return seen.logits_bV

        folded = self.voices.speaker.fold and new >= FOLD_FROM
        with self.voices.policy.acting_as(voice.role, decoding=new >= FOLD_FROM, folded=folded):
            forward, shared = self.voices.policy.forward, voice.shared
            told_of = any(answer.top is not None for answer in batch)  # then every token's logits are looked at as they are made
            drawn = draw(
                forward, prompts, shared, noted if told_of else predict, stops, sampler, 0, numbers,
                every=1 if told_of else EVERY, record=not told_of,
            )  # fmt: skip
            enough_b: Tensor | None = None
            while True:
                try:
                    which_b, token_b = drawn.send(enough_b)
                except StopIteration:
                    return
                rows = [batch[int(row)] for row in which_b]
                told = self._told(rows, seen.logits_bV, token_b) if told_of else [None] * len(rows)
                for answer, token, one in zip(rows, token_b.tolist(), told, strict=True):
                    if not answer.ended:
                        self.tokens += 1
                        answer.add(token, token in stops, one)
                        answer.ended = answer.ended or answer.gone() or self._closing
                enough_b = torch.tensor([answer.ended for answer in rows])

    def _told(self, rows: Sequence[Answer], logits_bV: Tensor, token_b: Tensor) -> list[Token | None]:
        """What is told of each row's new token, where it was asked for; the model's own distribution, whatever the temperature."""
        asking = [number for number, answer in enumerate(rows) if answer.top is not None and not answer.ended]
        told: list[Token | None] = [None] * len(rows)
        if asking:
            found = self._tokens(logits_bV[asking].float().log_softmax(-1), token_b[asking], max(rows[n].top or 0 for n in asking))
            for number, token in zip(asking, found, strict=True):
                told[number] = Token(token.text, token.logprob, token.top[: rows[number].top])
        return told

    def _echo(self, batch: Sequence[Answer], voice: Voice) -> None:
        """Gives each answer its prompt, with the prompt's log-probabilities where they are wanted; a row at a time through the head."""
        told: dict[int, list[Token]] = {}
        asking = [n for n, answer in enumerate(batch) if answer.top is not None]
        with self.voices.policy.acting_as(voice.role):
            for part in batches([len(batch[n].ids[""]) for n in asking], self.sizes.read_tokens):
                rows = [asking[i] for i in part]
                ids = [list(batch[n].ids[""]) for n in rows]
                width = max(1, max(map(len, ids)) - 1)
                states_BTD = self.voices.policy.forward.hidden_states([one[:1] for one in ids], [one[1:] for one in ids], width)
                for n, one, states_TD in zip(rows, ids, states_BTD, strict=True):
                    found = [Token(self._text(one[0]), None, ())]
                    for at, logp_nV in logps_by_chunks(self.voices.policy.head, states_TD[: len(one) - 1], self.sizes.chunk_tokens):
                        found += self._tokens(logp_nV, torch.tensor(one[1:])[at], batch[n].top or 0)
                    told[n] = found
        for n, answer in enumerate(batch):
            answer.begin(answer.decode(answer.ids[""]), told.get(n, []))

    def _tokens(self, logp_nV: Tensor, token_n: Tensor, top: int) -> list[Token]:
        """Tokens with their log-probabilities and the `top` likeliest in their places."""
        own_n = logp_nV.gather(-1, token_n[:, None].to(logp_nV.device))[:, 0].tolist()
        best_nk, which_nk = logp_nV.topk(top) if top else (torch.empty(len(logp_nV), 0), torch.empty(len(logp_nV), 0))
        rows = zip(token_n.tolist(), own_n, best_nk.tolist(), which_nk.tolist(), strict=True)
        return [
            Token(self._text(token), own, tuple((self._text(int(other)), logp) for other, logp in zip(others, best, strict=True)))
            for token, own, best, others in rows
        ]

    def _text(self, token: int) -> str:
        text: str = self.voices.chat.tokenizer.decode([token])
        return text

    def _reward(self, answer: Answer) -> None:
        """Of each token: what the description rewards, what training changed, and their difference, equation 4."""
        assert answer.turns is not None
        rewards: list[dict[str, float | str]] = []
        if answer.drawn:
            with self.voices.tokenizing:
                found = self.voices.heard(answer.settings.strength).rewards(answer.turns, answer.drawn)
            trained = found.get("trained", [0.0] * len(answer.drawn))
            for text, described, changed in zip(self.voices.chat.pieces(answer.drawn), found["described"], trained, strict=True):
                rewards.append({"text": text, "described": described, "trained": changed, "reward": described - changed})
        answer.emit(Done(answer.choice, len(answer.drawn), rewards))

    def _failed(self, batch: Sequence[Answer], error: Exception) -> None:
        """Without memory for all, half of them is tried; anything else is told to who asked, and to the terminal."""
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)
            let_go()
            again = [answer for answer in batch if not answer.ended and not answer.drawn and not answer.echo]
            if len(batch) > 1 and len(again) == len(batch):
                self._rows = len(batch) // 2
                with self._more:
                    self.queue = [*batch, *self.queue]
                return
            fault = FULL
        else:
            traceback.print_exception(error, file=sys.stderr)
            fault = ApiError(500, "the server failed at this; its terminal says more.", code="internal_error")
        for answer in batch:
            if not answer.ended or answer.rewards:
                answer.fail(fault)


class Seen:
    """The logits [b, V] that the last tokens were drawn from."""

    logits_bV: Tensor
