"""Who answers in a look, a probe or a comparison, and the answers themselves, kept so that no question is put twice.

WHO-DIGEST.jsonl holds a line an answer; the digest covers all that it depends on but the request and the seed, which the line names. What
a run's adapters say is kept in runs/NAME/answers/; what needs no training (base, prompted base, superior) in the user's cache too, so that a
look before training, a probe and a comparison share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from iqlite.chat.superior import superior_answers
from iqlite.errors import warn
from iqlite.integrity import sealed, unsealed
from iqlite.model.sampling import Sampler
from iqlite.model.template import Description
from iqlite.places import cache_folder
from iqlite.records import Messages, Rollout
from iqlite.run.files import explained
from iqlite.training.measuring import rollout_of, token_logps
from iqlite.training.readings import Reading
from iqlite.training.session import Session

FOLDER = "answers"
TOGETHER = 128  # answers that are drawn before they are kept; our choice
UNTRAINED = ("reference", "superior")  # roles that answer alike in every run of a recipe


@dataclass(frozen=True)
class Answerer:
    """Who is asked: a role, prompted with a description or not; the role "superior" is π̃ itself. `of` is what else the answers depend on."""

    name: str
    role: str
    description: Description | None = None
    of: str = ""

    def asked(
        self, session: Session, requests: Sequence[Messages], sampler: Sampler, index: Sequence[int], progress: Callable[[int], None]
    ) -> Rollout:
        """Its answers; `index` are the requests' numbers, by which the noise goes."""
        if self.role == "superior":
            return superior_answers(session, requests, sampler, index=index, progress=progress)
        return session.answers(self.role, requests, sampler, description=self.description, index=index, progress=progress)


@dataclass(frozen=True)
class Answer:
    """One answer as it is kept; `of` is its request's digest. `nll` is its mean −log π_ref under the plain prompt, nats a token: how
    strange the base finds it."""

    of: str
    seed: int
    index: int
    prompt: str
    answer: str
    tokens: int
    ended: bool
    nll: float | None = None


def prompted_answerers(session: Session) -> list[Answerer]:
    """The base prompted with the wanted description, in every placement that the template has."""
    if session.wanted is None:
        return []
    placements = ("system", "user") if session.chat.system_turn else ("user",)
    return [Answerer(f"prompted ({p} turn)", "reference", replace(session.wanted, placement=p)) for p in placements]


def collect(
    session: Session, run: Path | None, who: Answerer, requests: Sequence[Messages], samplers: Sequence[Sampler],
    progress: Callable[[int], None], *, index: Sequence[int] | None = None, strangeness: bool = True,
) -> list[list[Answer]]:  # fmt: skip
    """[seed][prompt]: what `who` answers, as far as it's kept from there; kept in the run's folder `run`, if there is one.

    `index` are the requests' numbers in their set, which key the noise. Without `strangeness` the base doesn't read them (`nll` may be None).
    """
    name = f"{_file_name(who.name)}-{_digest(session, who, samplers[0])}.jsonl"
    shared = [cache_folder() / FOLDER / name] if who.role in UNTRAINED else []
    own = [run / FOLDER / name] if run else []
    numbers = list(range(len(requests)) if index is None else index)
    keys = [(digest_of(request), number) for request, number in zip(requests, numbers, strict=True)]
    if not session.ranks.leads:  # the process that leads reads and writes what is kept
        own, shared = [], []
    in_run, kept = [{(a.of, a.index, a.seed): a for path in paths for a in _read(path)} for paths in (own, own + shared)]
    if session.ranks.size > 1:
        needed = {(*key, sampler.seed) for key in keys for sampler in samplers}
        told = [Answer(**one) for one in session.ranks.told([asdict(a) for key, a in kept.items() if key in needed])]
        kept = {(a.of, a.index, a.seed): a for a in told}
    found = []
    for sampler in samplers:
        missing = [row for row, key in enumerate(keys) if (*key, sampler.seed) not in kept]
        progress(len(requests) - len(missing))
        for part in (missing[at : at + TOGETHER] for at in range(0, len(missing), TOGETHER)):
            rollout = who.asked(session, [requests[row] for row in part], sampler, [numbers[row] for row in part], progress)
            answers = [
                Answer(
                    *(keys[row][0], sampler.seed, numbers[row], requests[row][-1]["content"], session.chat.text(rollout.response_ids(at))),
                    *(int(rollout.mask_BT[at].sum()), bool(rollout.ended_B[at])),
                )
                for at, row in enumerate(part)
            ]
            if strangeness:
                answers = [replace(a, nll=nll) for a, nll in zip(answers, base_nll(session, rollout), strict=True)]
            kept |= {(a.of, a.index, a.seed): a for a in answers}
            _keep(shared, answers)
            _keep_in(run, own, answers)
            in_run |= {(a.of, a.index, a.seed): a for a in answers}
        asked = [kept[(*key, sampler.seed)] for key in keys]
        if strangeness and (unread := [row for row, a in enumerate(asked) if a.nll is None]):
            rollout = rollout_of(session, [requests[row] for row in unread], [asked[row].answer for row in unread])
            for row, nll in zip(unread, base_nll(session, rollout), strict=True):
                asked[row] = replace(asked[row], nll=nll)
            _keep(shared, [asked[row] for row in unread])
        _keep_in(run, own, [a for a in asked if in_run.get((a.of, a.index, a.seed)) != a])
        found.append(asked)
    return found


def base_nll(session: Session, rollout: Rollout) -> list[float]:
    """Mean −log π_ref of each answer's tokens under the plain prompt, nats a token [B]."""

    def of(rows: list[int]) -> list[float]:
        mine = rollout.some(rows)
        logp_BT = token_logps(session, mine, [Reading("reference", "reference")])["reference"]
        means: list[float] = (-logp_BT.sum(-1) / mine.mask_BT.sum(-1)).tolist()
        return means

    return session.ranks.spread(rollout.mask_BT.sum(-1).tolist(), of)


def digest_of(request: Messages) -> str:
    """What tells one request from another."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]


def _digest(session: Session, who: Answerer, sampler: Sampler) -> str:
    recipe = session.recipe
    prompted = asdict(who.description) if who.description else None
    superior = None
    if who.role == "superior":  # what it depends on, however the recipe spells it
        behavior = recipe.behavior.model_dump(exclude={"placement"})
        superior = [behavior, recipe.superior.estimator, recipe.superior.settings(), session.placement]
    of = session.policy.base
    base = [of.identity.weights, recipe.model.quantization, str(of.compute_dtype), session.chat.template]
    role = "adapter" if who.of else who.role  # whichever place it has on the command line
    data = [role, prompted, who.of, superior, base, asdict(replace(sampler, seed=0))]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]


def _keep(paths: Sequence[Path], answers: Sequence[Answer]) -> None:
    """Into the cache; it is a convenience, so that a disk may refuse."""
    with suppress(OSError):
        _append(paths, answers)


def _keep_in(run: Path | None, paths: Sequence[Path], answers: Sequence[Answer]) -> None:
    """Into the run, whose figures they are: what a disk refuses is said."""
    if run:
        with explained(run, "compare again"):
            _append(paths, answers)


def _append(paths: Sequence[Path], answers: Sequence[Answer]) -> None:
    for path in paths if answers else ():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + "".join(sealed(asdict(answer), path.name) + "\n" for answer in answers))


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def _read(path: Path) -> list[Answer]:
    found: list[Answer] = []
    damaged = 0
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            try:
                found += [Answer(**unsealed(line, path.name))] if line else []
            except (ValueError, TypeError):
                damaged += 1
    if damaged:  # or the line that a kill cut in two
        warn(
            f"{path}: {damaged} of {len(found) + damaged} kept answers are damaged or another's; what is needed of them is asked for again."
        )
    return found
