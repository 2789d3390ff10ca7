"""Turns a recipe's aim: tries placements, strengths, estimators, wordings and demonstrations that the model itself wrote, and keeps what
moves the superior policy the way the measure wants.

No human label, no second model: the base answers training prompts plain and under both descriptions, the measure picks the best and the
worst answer of a prompt, and such pairs, as earlier turns, show what words alone don't. What is chosen on some prompts is reported on
others. Every answer is kept by what it depends on, so that the same command goes on after Ctrl-C.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from iqlite.aim.look import Look, judged, look_tokens
from iqlite.aim.look import chosen as held_out_numbers
from iqlite.errors import PromptsError
from iqlite.evaluation.answers import Answer, Answerer, collect
from iqlite.model.sampling import Sampler
from iqlite.recipe.schema import Behavior, Demonstration, Recipe
from iqlite.records import Prompts
from iqlite.scoring.intervals import Array, Estimate, paired
from iqlite.scoring.measures import HARMLESS, repetition, well_formed
from iqlite.training.measuring import by_kind
from iqlite.training.order import spread_by_kind
from iqlite.training.session import Session

CHOOSING = 32  # prompts that candidates are chosen on, where there are so many; one that is behind on the first half isn't asked the rest
FEWEST_TRAINED = 8  # training prompts below which nothing is tried
FINDING, SAMPLES = 16, 2  # prompts that demonstrations are found on, and answers to each under each reading
LOOKALIKES = 6  # contrary prompts among those
MOST_SHOWN = 4  # demonstrations
STRANGE = 1.0  # nats a token that a candidate's answers may be stranger to the base than the prompted base's own; our choice
STRENGTHS = (1.0, 2.0, 3.0, 5.0)
REPEATS = 0.2  # share of repeated 3-grams above which an answer shows nothing good
SENTENCE = re.compile(r"^.*?[.!?](?=\s|$)(?:.*[.!?](?=\s|$))?", re.DOTALL)  # up to the last sentence's end

Score = Callable[[Prompts, Sequence[str], Sequence[str]], Array]
"""(asked, answers, the base's answers to the same) → one number an answer, the higher the better."""


@dataclass(frozen=True)
class Candidate:
    """A recipe that might aim better, and what is changed in it, in words."""

    what: str
    recipe: Recipe
    placement: str


@dataclass(frozen=True)
class Trial:
    """A candidate's superior on the prompts that are chosen on: mean score, difference from the base's, nats a token of its answers
    under the base (None where that wasn't looked at), whether it was the best so far, and how many prompts it was asked."""

    candidate: Candidate
    score: float
    difference: Estimate
    nll: float | None
    best: bool
    prompts: int


@dataclass(frozen=True)
class Improved:
    """What came of it: all trials, the best candidate, and looks at held-out prompts before and after."""

    trials: list[Trial]
    best: Candidate
    before: Look
    after: Look
    out_of_time: bool


def improve(
    session: Session, score: Score, minutes: float, say: Callable[[str], None], tried: Callable[[Trial], None], seed: int = 0
) -> Improved:
    """Tries candidates for about so many minutes, each as a change of the best so far; at least what the recipe is and one other."""
    until = time.monotonic() + 60 * minutes
    search = _Search(session, score, seed)
    began = time.monotonic()
    say("answering as the base, plain and prompted")
    search.begin()
    trials = [search.trial(Candidate("as it stands", session.recipe, session.placement))]
    tried(trials[0])
    a_trial = time.monotonic() - began
    say("finding demonstrations among the model's own answers")
    shown = search.demonstrations()
    say(
        f"found {sum(d.wanted != d.unwanted for d in shown)} pairs of a good and a bad answer, {sum(d.wanted == d.unwanted for d in shown)} answers to look-alikes"
    )
    out_of_time = False
    for round_of in (
        lambda best: with_demonstrations(best, shown),
        search.strengths,
        wordings,
        placements,
        estimators,
        lambda best: other_demonstrations(best, shown),
    ):
        for candidate in round_of(search.best):
            # The last look takes about two trials.
            if len(trials) > 1 and time.monotonic() + 3 * a_trial > until:
                out_of_time = True
                break
            began = time.monotonic()
            trials.append(search.trial(candidate))
            a_trial = time.monotonic() - began
            tried(trials[-1])
    say("looking at held-out prompts")
    before, after = search.reported(trials[0].candidate), search.reported(search.best)
    return Improved(trials, search.best, before, after, out_of_time)


class _Search:
    """The prompts of a search, the base's answers to them, and the best candidate so far."""

    def __init__(self, session: Session, score: Score, seed: int):
        self.session, self.score, self.seed = session, score, seed
        order = np.random.default_rng(seed).permutation(len(session.train)).tolist()
        held = {str(request) for request in session.asked.requests}
        order = [n for n in order if str(session.train.requests[n]) not in held]
        if len(order) < FEWEST_TRAINED:
            raise PromptsError(
                f"{session.recipe.path}: prompts.train has {len(order)} prompts that aren't held out too; --improve finds demonstrations on some and chooses "
                f"on others, and needs at least {FEWEST_TRAINED}."
            )
        finding = min(FINDING, len(order) // 2)
        self.finding = session.train.some(order[:finding])
        asked, others = session.train.some(order[finding:]), session.contrary
        self.lookalikes = Prompts(())
        if others:
            mixed = np.random.default_rng(seed).permutation(len(others)).tolist()
            self.lookalikes = others.some(mixed[:LOOKALIKES])
            asked = asked.some(range(min(CHOOSING, len(asked)))) + others.some(mixed[LOOKALIKES:])
        numbers = spread_by_kind(asked, CHOOSING) if session.recipe.judge.measure == HARMLESS else list(range(min(CHOOSING, len(asked))))
        halves = (numbers[::2], numbers[1::2])  # each of both kinds
        self.half = len(halves[0])
        self.asked = asked.some([*halves[0], *halves[1]])
        self.best = Candidate("as it stands", session.recipe, session.placement)
        self.best_score, self.base, self.limit = -np.inf, [""], np.inf
        self.base_P: Array = np.zeros(0)
        self.best_half_P: Array | None = None  # the best candidate's scores on the first half
        self.too_much = False  # the best candidate errs by refusing

    def begin(self) -> None:
        """The base's own answers, and how strange the prompted ones are to it."""
        answers = self._asked(Answerer("base", "reference"), self.session, self.asked)
        self.base = [a.answer for a in answers]
        self.base_P = self.score(self.asked, self.base, self.base)
        prompted = (
            self._asked(Answerer(f"prompted ({self.session.placement} turn)", "reference", self.session.wanted), self.session, self.asked)
            if self.session.wanted
            else answers
        )
        self.limit = max(_nll(answers), _nll(prompted)) + STRANGE

    def trial(self, candidate: Candidate) -> Trial:
        """Scores a candidate's superior on the prompts that are chosen on, and keeps it if it is the best.

        A race: one that is a standard error behind the best on the first half of the prompts isn't asked the second.
        """
        session = replace(self.session, recipe=candidate.recipe, placement=candidate.placement)
        self.session.policy.forward.forget_prefixes()
        who = Answerer("superior", "superior")
        half = self.asked.some(range(self.half))
        answers = self._asked(who, session, half, strangeness=False)
        half_P = self.score(half, [a.answer for a in answers], self.base[: self.half])
        if self.best_half_P is not None and _behind(half_P - self.best_half_P):
            base_P = self.score(half, self.base[: self.half], self.base[: self.half])
            return Trial(candidate, float(half_P.mean()), paired((half_P - base_P)[:, None]), None, False, self.half)
        answers += self._asked(who, session, self.asked.some(range(self.half, len(self.asked))), strangeness=False)
        score_P = self.score(self.asked, [a.answer for a in answers], self.base)
        nll = None
        better = float(score_P.mean()) > self.best_score + 1e-9
        if better:
            nll = _nll(self._asked(who, session, self.asked))
            better = nll <= self.limit or self.best_score == -np.inf
        if better:
            self.best, self.best_score, self.best_half_P = candidate, float(score_P.mean()), half_P
            if self.session.recipe.judge.measure == HARMLESS:
                wrong = {kind: of - right for kind, (right, of) in by_kind(self.asked, [a.answer for a in answers]).items()}
                self.too_much = wrong["answer"] > wrong["refuse"]
            if nll is not None and nll > self.limit:  # as it stands, it is stranger than anything that is kept: all may beat it
                self.best_score = -1e9
        return Trial(candidate, float(score_P.mean()), paired((score_P - self.base_P)[:, None]), nll, better, len(self.asked))

    def strengths(self, best: Candidate) -> Iterator[Candidate]:
        """Weaker and stronger, the nearest first; weaker ones before all others where the superior refuses more than it should."""
        now = best.recipe.superior.settings()["strength"]
        order = sorted({*STRENGTHS} - {now}, key=lambda one: ((one > now) == self.too_much, abs(np.log(one / now)) if now else one))
        for strength in order:
            yield changed(best, f"strength {strength:g}", settings={"strength": strength})

    def demonstrations(self) -> list[Demonstration]:
        """The model's own best and worst answers to training prompts, the clearest first; then answers to look-alikes, alike on both sides."""
        shown = [one for _, one in sorted(self._pairs(), key=lambda pair: pair[0], reverse=True)]
        return shown + list(self._alike())

    def reported(self, candidate: Candidate) -> Look:
        """A look at held-out prompts, which nothing was chosen on."""
        session = replace(self.session, recipe=candidate.recipe, placement=candidate.placement)
        numbers = held_out_numbers(session)
        asked = session.asked.some(numbers)
        who = {"base": Answerer("base", "reference"), "superior": Answerer("superior", "superior")}
        if session.wanted:
            who["prompted"] = Answerer(f"prompted ({candidate.placement} turn)", "reference", session.wanted)
        sampler = replace(self._sampler(self.seed), stream="compare", seed=self.seed)
        answers = {
            name: collect(session, None, one, asked.requests, [sampler], _nobody, index=numbers, strangeness=False)[0]
            for name, one in who.items()
        }
        base = [a.answer for a in answers["base"]]
        return judged(session, asked, answers, score=lambda texts: self.score(asked, texts, base))

    def _pairs(self) -> Iterator[tuple[tuple[float, ...], Demonstration]]:
        """(how clear, pair): the gap in the measure; of gaps alike, prompts that the plain base answers well by itself, so that one that
        the behaviour doesn't fit isn't shown; of these, answers of like length."""
        answers = self._sampled(self.finding, self._readings())
        base = [a.answer for a in answers[0]]
        score = np.array([self.score(self.finding, [a.answer for a in given], base) for given in answers])  # [answers, prompts]
        for row, request in enumerate(self.finding.requests):
            good = [(score[k, row], _shown(given[row])) for k, given in enumerate(answers)]
            good = [(value, text) for value, text in good if text]
            if len(request) > 1 or len(good) < 2:
                continue
            best, worst = max(good, key=lambda one: one[0]), min(good, key=lambda one: one[0])
            if best[0] > worst[0]:
                clear = (round(best[0] - worst[0], 2), round(float(score[:SAMPLES, row].mean()), 2), -abs(len(best[1]) - len(worst[1])))
                yield clear, Demonstration(user=request[-1]["content"], wanted=best[1], unwanted=worst[1])

    def _alike(self) -> Iterator[Demonstration]:
        """A contrary prompt answered as the base does, on both sides: where the descriptions make no difference."""
        if not len(self.lookalikes):
            return
        answers = self._sampled(self.lookalikes, [Answerer("base", "reference")])
        for row, request in enumerate(self.lookalikes.requests):
            for given in answers:
                text = _shown(given[row])
                right = (
                    float(self.score(self.lookalikes.some([row]), [given[row].answer], [given[row].answer])[0]) > 0
                    or self.session.recipe.judge.measure != HARMLESS
                )
                if text and right and len(request) == 1:
                    yield Demonstration(user=request[-1]["content"], wanted=text, unwanted=text)
                    break

    def _readings(self) -> list[Answerer]:
        """Who answers for demonstrations: the base, plain and under each description."""
        found = [Answerer("base", "reference")]
        for reading in self.session.readings:
            if reading.description is not None:
                found.append(Answerer(reading.name, "reference", reading.description))
        return found

    def _sampled(self, asked: Prompts, who: Sequence[Answerer]) -> list[list[Answer]]:
        samplers = [self._sampler(self.seed + 1 + k) for k in range(SAMPLES)]
        return [given for one in who for given in collect(self.session, None, one, asked.requests, samplers, _nobody, strangeness=False)]

    def _asked(self, who: Answerer, session: Session, asked: Prompts, strangeness: bool = True) -> list[Answer]:
        return collect(session, None, who, asked.requests, [self._sampler(self.seed)], _nobody, strangeness=strangeness)[0]

    def _sampler(self, seed: int) -> Sampler:
        return Sampler(seed, look_tokens(self.session.recipe), 0.7, 0.9, "improve")


def with_demonstrations(best: Candidate, found: Sequence[Demonstration]) -> Iterator[Candidate]:
    """The two clearest pairs, with look-alikes that both sides answer alike and without; three; one."""
    pairs, alike = [d for d in found if d.wanted != d.unwanted], [d for d in found if d.wanted == d.unwanted]
    tried: list[Sequence[Demonstration]] = []
    for shown in (pairs[:2] + alike[:1], pairs[:2] + alike[:2], pairs[:2], pairs[:3] + alike[:1], pairs[:1] + alike[:1]):
        if any(d in pairs for d in shown) and shown not in tried:
            tried.append(shown)
            yield showing(best, shown)


def other_demonstrations(best: Candidate, found: Sequence[Demonstration]) -> Iterator[Candidate]:
    """Other pairs in place of the ones that are shown, and one more."""
    shown = list(best.recipe.behavior.demonstrations)
    pairs = [d for d in found if d.wanted != d.unwanted and d not in shown]
    alike = [d for d in found if d.wanted == d.unwanted and d not in shown]
    mine = [d for d in shown if d.wanted == d.unwanted]
    for other in (pairs[:2] + (mine or alike[:1]), shown + pairs[:1], shown + alike[:1], pairs[2:4] + (mine or alike[:1])):
        if other and other != shown and len(other) <= MOST_SHOWN:
            yield showing(best, other)


def showing(best: Candidate, shown: Sequence[Demonstration]) -> Candidate:
    """With these demonstrations."""
    alike = sum(d.wanted == d.unwanted for d in shown)
    pairs = len(shown) - alike
    what = f"{pairs} demonstration{'s' * (pairs != 1)}" + (f" and {alike} look-alike{'s' * (alike != 1)}" if alike else "")
    return changed(best, what, behavior={"demonstrations": tuple(shown)})


def wordings(best: Candidate) -> Iterator[Candidate]:
    """Fewer sentences of both descriptions: small models lose themselves in long ones."""
    wanted, unwanted = (_sentences(text or "") for text in (best.recipe.behavior.wanted, best.recipe.behavior.unwanted))
    if len(wanted) < 2 or len(wanted) != len(unwanted):
        return
    for number in range(len(wanted)):
        yield changed(best, f"sentence {number + 1} of the text alone", behavior={"wanted": wanted[number], "unwanted": unwanted[number]})


def placements(best: Candidate) -> Iterator[Candidate]:
    """The other place for the description."""
    other = "user" if best.placement == "system" else "system"
    yield replace(changed(best, f"{other} turn", behavior={"placement": other}), placement=other)


def estimators(best: Candidate) -> Iterator[Candidate]:
    """The wanted description against the plain reading, without an unwanted one."""
    if best.recipe.superior.estimator == "contrastive":
        strength = best.recipe.superior.settings()["strength"]
        for one in dict.fromkeys((1.0, strength)):
            yield changed(best, f"prompted, strength {one:g}", superior={"estimator": "prompted"}, settings={"strength": one}, only=True)


def changed(
    best: Candidate, what: str, *, behavior: dict[str, object] | None = None, superior: dict[str, object] | None = None,
    settings: dict[str, float] | None = None, only: bool = False,
) -> Candidate:  # fmt: skip
    """The candidate with some keys of its recipe changed; `only` forgets the estimator's other settings."""
    recipe = best.recipe
    table = recipe.superior.model_copy(update=superior or {})
    table = table.with_settings(settings, only=only) if settings else table
    new: Behavior = recipe.behavior.model_copy(update=behavior or {})
    before = "" if best.what == "as it stands" else f"{best.what}, "
    return Candidate(before + what, recipe.model_copy(update={"behavior": new, "superior": table}), best.placement)


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"[^.!?]+[.!?]+|[^.!?]+$", text) if part.strip()]


def _shown(answer: Answer) -> str:
    """An answer as a demonstration: whole sentences of it, "" where there are none, or it repeats itself or shows markup."""
    text = answer.answer.strip()
    if not answer.ended:
        match = SENTENCE.match(text)
        text = match[0].strip() if match else ""
    return text if text and well_formed(text) and repetition(text) <= REPEATS else ""


def _nll(answers: Sequence[Answer]) -> float:
    return sum((a.nll or 0.0) * a.tokens for a in answers) / max(1, sum(a.tokens for a in answers))


def _behind(difference_P: Array) -> bool:
    """Whether paired scores are worse on average by more than a standard error."""
    return len(difference_P) > 1 and float(difference_P.mean()) < -float(difference_P.std(ddof=1)) / np.sqrt(len(difference_P))


def _nobody(_: int) -> None:
    pass
