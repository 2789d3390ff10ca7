"""Who answers in a comparison, and the answers themselves, kept in the run so that no question is put twice.

runs/NAME/answers/WHO-DIGEST.jsonl   a line an answer; the digest covers all that it depends on but the seed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from iqlite.chunked import spans
from iqlite.contrast import superior_answers
from iqlite.objectives import of_tokens
from iqlite.prompts import Description
from iqlite.records import Messages, Rollout
from iqlite.rollout import Sampler
from iqlite.rundir import RunDir, explained
from iqlite.session import Session
from iqlite.superior import Reading, read

FOLDER = "answers"
TOGETHER = 128  # answers that are drawn before they are kept; ours


@dataclass(frozen=True)
class Answerer:
    """Who is asked: a role, told a description or not; the role "superior" is π̃ itself. `of` is what else the answers depend on."""

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
    """One answer as it is kept. `nll` is its mean −log π_ref under the plain prompt, nats a token: how strange the base finds it."""

    seed: int
    index: int
    prompt: str
    answer: str
    tokens: int
    ended: bool
    nll: float


def told_answerers(session: Session) -> list[Answerer]:
    """The base told the wanted description, in every placement that the template has."""
    if session.wanted is None:
        return []
    placements = ("system", "user") if session.chat.system_turn else ("user",)
    return [Answerer(f"told ({p} turn)", "reference", replace(session.wanted, placement=p)) for p in placements]


def collect(
    session: Session, run: RunDir, who: Answerer, requests: Sequence[Messages], samplers: Sequence[Sampler], progress: Callable[[int], None]
) -> list[list[Answer]]:
    """[seed][prompt]: what `who` answers, from the run's folder as far as it's there."""
    path = run.path / FOLDER / f"{_file_name(who.name)}-{_digest(session, who, requests, samplers[0])}.jsonl"
    kept = {(answer.seed, answer.index): answer for answer in _read(path)}
    found = []
    for sampler in samplers:
        missing = [number for number in range(len(requests)) if (sampler.seed, number) not in kept]
        progress(len(requests) - len(missing))
        for part in (missing[at : at + TOGETHER] for at in range(0, len(missing), TOGETHER)):
            rollout = who.asked(session, [requests[number] for number in part], sampler, part, progress)
            answers = [
                Answer(
                    sampler.seed,
                    number,
                    requests[number][-1]["content"],
                    session.chat.text(rollout.response_ids(row)),
                    int(rollout.mask_BT[row].sum()),
                    bool(rollout.ended_B[row]),
                    nll,
                )
                for row, (number, nll) in enumerate(zip(part, base_nll(session, rollout), strict=True))
            ]
            with explained(run.path, "compare again"):
                path.parent.mkdir(exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n" + "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
            kept |= {(answer.seed, answer.index): answer for answer in answers}
        found.append([kept[sampler.seed, number] for number in range(len(requests))])
    return found


def base_nll(session: Session, rollout: Rollout) -> list[float]:
    """Mean −log π_ref of each answer's tokens under the plain prompt, nats a token [B]."""
    policy, mask_BT = session.policy, rollout.mask_BT
    hidden_ND = read(policy, session.chat, rollout, [Reading("reference", "reference")], session.sizes).hidden["reference"][mask_BT]
    ids_N, nll_N = rollout.tokens_BT[mask_BT], torch.zeros(int(mask_BT.sum()))
    with torch.no_grad():
        for at in spans(len(hidden_ND), session.sizes.chunk_tokens):
            logp_nV = policy.head(hidden_ND[at]).log_softmax(-1)
            nll_N[at] = -of_tokens(logp_nV, ids_N[at].to(logp_nV.device)).cpu()
    nll_BT = torch.zeros(mask_BT.shape)
    nll_BT[mask_BT] = nll_N
    means: list[float] = (nll_BT.sum(-1) / mask_BT.sum(-1)).tolist()
    return means


def _digest(session: Session, who: Answerer, requests: Sequence[Messages], sampler: Sampler) -> str:
    recipe = session.recipe
    told = asdict(who.description) if who.description else None
    superior = [recipe.behavior.model_dump(), recipe.superior.model_dump(), session.placement] if who.role == "superior" else None
    of = session.policy.base
    base = [of.identity.weights, recipe.model.quantization, str(of.compute_dtype), session.chat.template]
    role = "adapter" if who.of else who.role  # whichever place it has on the command line
    data = [role, told, who.of, superior, base, requests, asdict(replace(sampler, seed=0))]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def _read(path: Path) -> list[Answer]:
    found: list[Answer] = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            try:
                found += [Answer(**json.loads(line))] if line else []
            except (ValueError, TypeError):  # the line that a kill cut in two
                continue
    return found
