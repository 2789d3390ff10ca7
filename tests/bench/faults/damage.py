"""Each file of a run, a baseline and the kept answers, damaged in six ways, and what resume, merge and compare make of it.

Right is the undisturbed result, together with a sentence if something was lost on the way, or a sentence and exit code 2.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench.faults.harness import COMPARE, MERGE, TRAIN, call, compared, difference, fresh, trained, tree

WAYS = ("cut short", "empty", "a bit flipped", "of another run", "half of another run's", "deleted")
NAMES = re.compile(r"(?<=step-)\d+|(?<=-)[0-9a-f]{12}(?=\.jsonl)")  # what differs from run to run
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "iqlite.json", "manifest.json")


def damage(path: Path, way: str, other: Path, dice: random.Random) -> bool:
    """Does it; False where there is nothing to do it with."""
    data, foreign = path.read_bytes(), other.read_bytes() if other.is_file() else b""
    at = dice.randrange(len(data))
    damaged = {
        "cut short": data[: max(1, len(data) * 2 // 3)],
        "empty": b"",
        "a bit flipped": data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :],
        "of another run": foreign,
        "half of another run's": data[: len(data) // 2] + foreign[len(data) // 2 :],
    }
    if way == "deleted":
        path.unlink()
        return True
    path.write_bytes(damaged[way])
    return damaged[way] != data


def cases(whole: Path) -> list[tuple[str, str, str, list[str]]]:
    """(what is done then, the run it is done to, the damaged file, the command)."""
    resume, merge = [*TRAIN, "--no-safety", "--resume"], [*MERGE, "--force"]
    top = ["recipe.toml", "environment.json", "manifest.json", "metrics.jsonl", "samples.jsonl"]
    adapter, best = ([f"{folder}/{name}" for name in ADAPTER] for folder in ("adapter", "best"))
    checkpoint = ["state.safetensors", "state.json", "manifest.json", "recipe.toml", "environment.json"]
    found = [("resume", "killed", f"checkpoints/step-00000{step}/{name}", resume) for step in (2, 4) for name in checkpoint]
    found += [("resume", "killed", name, resume) for name in [*top, *best]]
    found += [("resume, finished", "run", name, resume) for name in ["checkpoints/step-000006/state.safetensors", *top, *adapter[:2], best[0], "result.json"]]  # fmt: skip
    found += [("merge", "run", name, merge) for name in [*top[:4], *adapter]]
    found += [("merge --which best", "run", name, [*merge, "--which", "best"]) for name in best]
    baseline = [*ADAPTER[:2], "baseline.json", "manifest.json", "metrics.jsonl", "samples.jsonl"]
    answers = sorted(str(file.relative_to(whole / "run")) for file in (whole / "run" / "answers").glob("*.jsonl"))
    found += [("compare", "run", name, COMPARE) for name in [*top[:3], "result.json", *(f"baselines/ppo/{name}" for name in baseline), *answers, "compare.json"]]  # fmt: skip
    return found


def tries(folder: Path, whole: Path, only: str, known: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, what came of it) of each try that isn't `known`."""
    left: dict[str, Callable[[], Any]] = {
        "train": lambda: trained(folder / "run"),
        "merge": lambda: tree(folder / "out"),
        "compare": lambda: compared(folder / "run"),
    }
    references: dict[str, Any] = {}
    for then, run, file, command in cases(whole):
        if only and only not in f"{then} {file}":
            continue
        for way in WAYS:
            place = NAMES.sub("…", file)
            key = f"damaged | {then} | {file if 'step-' in file else place} | {way}"
            if key in known:
                continue
            if then not in references:
                fresh(folder, whole, [run])
                called = call(folder, command)
                assert called.code == 0, called.text
                references[then] = left[command[0]]()
            fresh(folder, whole, [run])
            path, other = folder / "run" / file, whole / "other" / file
            if not other.is_file():
                like = sorted((whole / "other" / Path(file).parent).glob(f"{Path(file).name.split('-')[0]}*"))
                other = like[0] if like else whole / "other" / "checkpoints" / "step-000004" / Path(file).name
            if not path.is_file() or not damage(path, way, other, random.Random(key)):
                continue
            called = call(folder, command)
            lines = [line for line in called.text.splitlines() if line.startswith("iqlite: ") or "trained anew" in line]
            said = [line for line in lines if "its lock is taken over" not in line]  # as after every kill
            yield (
                key,
                {"fault": "damaged", "then": then, "file": place, "way": way}
                | judged(called.code, called.text, said, left[command[0]], references[then])
                | {"said": said[0].replace(str(folder), "…") if said else ""},
            )


def judged(code: int, text: str, said: list[str], left: Callable[[], Any], reference: Any) -> dict[str, Any]:
    """What came of it, and what is wrong with that."""
    if "Traceback" in text or code not in (0, 2):
        return {"wrong": "traceback" if "Traceback" in text else f"exit code {code}", "detail": text[-1500:]}
    if code == 2:
        return {"outcome": "refused in a sentence"} if said else {"wrong": "refused without a sentence", "detail": text[-600:]}
    try:
        found = left()
    except (OSError, ValueError) as error:  # a finished run doesn't make anew what it has lost
        return {"outcome": "said, with a loss", "detail": str(error)} if said else {"wrong": "nothing whole is left", "detail": f"{error} {text[-800:]}"}  # fmt: skip
    if found == reference:
        return {"outcome": "said, the same result" if said else "not needed, the same result"}
    if said:
        return {"outcome": "said, with a loss", "detail": difference(found, reference)}
    return {"wrong": "another result in silence", "detail": difference(found, reference) + text[-500:]}
