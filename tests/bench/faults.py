"""What a run and the verbs on it survive: kills at every file operation, disks that fill at every one, damaged files.

    python -m tests.bench.faults [kills] [full] [damage] [--only VERB] [--every N] [--out tests/bench/results/faults.md]

A tiny model trains, compares, merges and exports in processes that are forked from this one. A small library before the C library
(faults.c, built with cc) counts their operations on files and kills them at the n-th, in the middle of it for every other write; or gives
no more disk space from the n-th on. Then the same command is given again (training with --resume), and what it leaves must be what an
undisturbed one leaves, to the byte: adapter, best, metrics but for times, samples; the merged model's and the exported files.

Damage is done to each file of a run, a baseline and the kept answers, in six ways, and then the run is resumed, merged or compared. Right is
either the undisturbed result together with a sentence that names the file, or a sentence and exit code 2; never a traceback, and never another
result without a word.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

LIBRARY = "IQLITE_FAULTS"
COUNT, KILL, HALF, FULL = range(4)
UNSTEADY = ("time/", "memory/")
STEPS = 6


def again_with_the_library() -> None:
    """Builds the library and starts this program once more, with it loaded."""
    built = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(built), str(Path(__file__).with_suffix(".c")), "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(built), LIBRARY: str(built), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "tests.bench.faults", *sys.argv[1:]], environment | {"PYTHONUNBUFFERED": ""})


class Verb:
    """A command, where it writes, and what it leaves that must be the same every time."""

    def __init__(self, name: str, first: list[str], then: list[str], writes: str, left: Callable[[Path], Any]):
        self.name, self.first, self.then, self.writes, self.left = name, first, then, writes, left


def call(folder: Path, arguments: Sequence[str], at: int = -1, kind: int = COUNT, watched: str = "") -> tuple[int, str, int]:
    """(exit code, −9 for a kill; what it said; operations counted) of `iqlite ARGUMENTS` in `folder`, in a process of its own."""
    said = folder / "said.txt"
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.chdir(folder)
            text = io.StringIO()
            from iqlite.cli import main

            sys.argv = ["iqlite", *arguments]
            library = ctypes.CDLL(os.environ[LIBRARY])
            library.faults_seen.restype = ctypes.c_long
            if watched:
                library.faults_arm(str(folder / watched).encode(), ctypes.c_long(at), kind)
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                try:
                    main()
                    code = 0
                except SystemExit as done:
                    code = int(done.code or 0)
                except BaseException:  # noqa: BLE001 - what a user would see
                    text.write(traceback.format_exc())
            seen = library.faults_seen()
            library.faults_arm(b"/nowhere", ctypes.c_long(-1), COUNT)
            said.write_text(json.dumps([seen, text.getvalue()]), "utf-8")
        finally:
            os._exit(code)
    said.unlink(missing_ok=True)
    _, status = os.waitpid(process, 0)
    seen, printed = json.loads(said.read_text("utf-8")) if said.is_file() else (0, "")
    return os.waitstatus_to_exitcode(status), printed, seen


def steady(run: Path) -> dict[str, Any]:
    """What must be the same in two runs of one recipe."""
    from safetensors import safe_open

    found: dict[str, Any] = {
        "samples": (run / "samples.jsonl").read_text("utf-8"),
        "result": json.loads((run / "result.json").read_bytes()),
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    found["metrics"] = [{name: value for name, value in line.items() if not name.startswith(UNSTEADY)} for line in lines]
    for which in ("adapter", "best"):
        with safe_open(run / which / "adapter_model.safetensors", "numpy") as file:
            found[which] = {name: hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest() for name in file.keys()}  # noqa: SIM118
    return found


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*") if path.name != ".lock")


def tree(path: Path) -> dict[str, str]:
    """Digest of every file below a folder, or of a file and what stands beside it."""
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else sorted(path.parent.glob(f"{path.name}*"))
    return {str(f.relative_to(path.parent)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def figures(run: Path) -> Any:
    """What a comparison has found, and the baseline's weights."""
    from safetensors import safe_open

    with safe_open(run / "baselines" / "ppo" / "adapter_model.safetensors", "numpy") as file:
        ppo = {name: hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest() for name in file.keys()}  # noqa: SIM118
    return json.loads((run / "compare.json").read_bytes()), ppo


def project(folder: Path) -> None:
    """A tiny base, prompts and two recipes."""
    from tests.helpers.tiny import save_tiny

    save_tiny(folder / "base")
    for name, numbers in (("train", range(8)), ("eval", range(8, 12))):
        lines = [json.dumps({"prompt": f"What is number {number} good for?"}) + "\n" for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    for name, wanted, unwanted in (("kind", "You are kind.", "You are mean."), ("rude", "You are rude.", "You are nice.")):
        data = {
            "model": {"base": "base", "quantization": "none"},
            "adapter": {"rank": 2, "alpha": 4.0},
            "behavior": {"wanted": wanted, "unwanted": unwanted, "placement": "system"},
            "prompts": {"train": "train.jsonl", "eval": "eval.jsonl", "eval_count": 2},
            "rollout": {"prompts_per_step": 2, "max_new_tokens": 4},
            "train": {"steps": STEPS, "eval_every": 2, "checkpoint_every": 2, "learning_rate": 1e-3},
            "judge": {"aim": False},
        }
        (folder / f"{name}.toml").write_text(tomli_w.dumps(data), "utf-8")


def verbs() -> list[Verb]:
    train = ["train", "kind.toml", "--out", "run", "--no-safety"]
    compare = ["compare", "run", "--count", "2", "--seeds", "1", "--no-safety", "--with", "ppo"]
    export = ["export", "run", "-o", "out", "--to"]
    return [
        Verb("train", train, [*train, "--resume"], "run", lambda f: (steady(f / "run"), leftovers(f / "run"))),
        Verb("compare", compare, compare, "run", lambda f: figures(f / "run")),
        Verb("merge", ["merge", "run", "-o", "out", "--no-check"], [], "", lambda f: tree(f / "out")),
        Verb("export peft", [*export, "peft"], [], "", lambda f: tree(f / "out")),
        Verb("export gguf", [*export, "gguf"], [], "", lambda f: tree(f / "out")),
        Verb("export gguf-adapter", [*export, "gguf-adapter"], [], "", lambda f: tree(f / "out")),
        Verb("export over another", [*export, "hf", "--force"], [], "", lambda f: tree(f / "out")),
    ]


def fresh(folder: Path, whole: Path, verb: Verb) -> None:
    """What the verb starts from."""
    for name in ("run", "out"):
        for leftover in [folder / name, *folder.glob(f"{name}.*"), *folder.glob(f".*{name}*")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    if verb.name != "train":
        shutil.copytree(whole / "run", folder / "run")
    if "--force" in verb.first:
        shutil.copytree(whole / "out", folder / "out")


def wait_for_kills(folder: Path, whole: Path, kind: str, only: str, every: int, rows: list[str], details: list[str]) -> None:
    """Kills, or has the disk full, at every operation of every verb."""
    for verb in verbs():
        if only and only not in verb.name:
            continue
        began = time.monotonic()
        fresh(folder, whole, verb)
        watched = verb.writes or ""
        code, text, seen = call(folder, verb.first, watched=watched or "out")
        hidden = 0
        if not watched:  # what is being made has a name of its own
            fresh(folder, whole, verb)
            code, text, seen = call(folder, verb.first, watched=".")
        assert code == 0, text
        del hidden
        reference = verb.left(folder)
        bad: Counter[str] = Counter()
        lost: list[int] = []
        times = 0
        for at in range(1, seen + 1, every):
            fresh(folder, whole, verb)
            how = FULL if kind == "full" else HALF if at % 2 else KILL
            code, text, _ = call(folder, verb.first, at, how, watched=watched or ".")
            times += 1
            if kind == "kills" and code != -9:
                bad["wasn't killed"] += 1
                continue
            if kind == "full" and code != 0:
                if "Traceback" in text:
                    bad["traceback"] += 1
                    details.append(f"{verb.name} full at {at}: {text[-1500:]}")
                elif code != 2 or "no space left" not in text.lower():
                    bad["no sentence on the disk"] += 1
                    details.append(f"{verb.name} full at {at}: {code} {text[-400:]}")
            if verb.name == "train":
                steps = (
                    len((folder / "run" / "metrics.jsonl").read_bytes().splitlines()) - 1
                    if (folder / "run" / "metrics.jsonl").is_file()
                    else 0
                )
                whole_checkpoints = sorted((folder / "run" / "checkpoints").glob("step-*"))
                lost.append(max(0, steps - (int(whole_checkpoints[-1].name[5:]) if whole_checkpoints else 0)))
            then = verb.then or verb.first
            there = (folder / "run").exists() or (folder / ".old-run").exists()
            if verb.name == "train" and not there:
                then = verb.first  # it was killed before the run was there
            code, text, _ = call(folder, then)
            if code != 0 and "exists already" in text:  # it had been done before the kill
                code = 0
            if code != 0:
                bad["traceback" if "Traceback" in text else "couldn't go on"] += 1
                details.append(f"{verb.name} {kind} at {at}: {code} {text[-1500:]}")
            elif (found := verb.left(folder)) != reference:
                bad["another result"] += 1
                details.append(f"{verb.name} {kind} at {at}: another result: {difference(found, reference)}")
        worst = f"{max(lost)} steps, done again" if lost else "nothing"
        rows.append(
            f"| {'killed' if kind == 'kills' else 'disk full'} in {verb.name} | {times} | {sum(bad.values())}{' ' + str(dict(bad)) if bad else ''} | {worst} |"
        )
        print(rows[-1], f"{time.monotonic() - began:.0f} s", flush=True)


def difference(a: Any, b: Any) -> str:
    return next((f"{str(x)[:200]} != {str(y)[:200]}" for x, y in zip(a, b, strict=False) if x != y), f"{str(a)[:200]} != {str(b)[:200]}")


DAMAGE = ("cut short", "empty", "a bit flipped", "of another run", "half of another run's", "deleted")


def damage(path: Path, how: str, other: Path, dice: random.Random) -> bool:
    """Does it; False where there is nothing to do it with."""
    data = path.read_bytes()
    foreign = other.read_bytes() if other.is_file() else b""
    if how == "cut short":
        path.write_bytes(data[: max(1, len(data) * 2 // 3)])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit flipped":
        at = dice.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :])
    elif how == "of another run":
        path.write_bytes(foreign)
    elif how == "half of another run's":
        path.write_bytes(data[: len(data) // 2] + foreign[len(data) // 2 :])
    else:
        path.unlink()
    return not path.is_file() or path.read_bytes() != data


def damaged_files(folder: Path, whole: Path, rows: list[str], details: list[str]) -> None:
    """Every file of an interrupted and of a finished run, in six ways, and what the verbs then do."""
    dice = random.Random(0)
    resume = ["train", "kind.toml", "--out", "run", "--no-safety", "--resume"]
    merge = ["merge", "run", "-o", "out", "--no-check", "--force"]
    best = [*merge, "--which", "best"]
    compare = ["compare", "run", "--count", "2", "--seeds", "1", "--no-safety", "--with", "ppo"]
    cases: list[tuple[str, str, list[str]]] = []
    top = ["recipe.toml", "environment.json", "manifest.json", "metrics.jsonl", "samples.jsonl"]
    adapters = [
        f"{a}/{f}"
        for a in ("adapter", "best")
        for f in ("adapter_model.safetensors", "adapter_config.json", "iqlite.json", "manifest.json")
    ]
    checkpoints = ["state.safetensors", "state.json", "manifest.json", "recipe.toml", "environment.json"]
    for which in ("step-000004", "step-000006"):
        cases += [("resume", f"checkpoints/{which}/{name}", resume) for name in checkpoints]
    cases += [("resume", name, resume) for name in [*top, *adapters, "result.json"]]
    cases += [("merge", name, merge) for name in [*top[:3], "metrics.jsonl", *adapters[:4]]]
    cases += [("merge --which best", name, best) for name in adapters[4:]]
    cases += [("compare", name, compare) for name in [*top[:3], "result.json"]]
    cases += [("compare", f"baselines/ppo/{f}", compare) for f in ("adapter_model.safetensors", "adapter_config.json", "baseline.json", "manifest.json", "metrics.jsonl", "samples.jsonl")]  # fmt: skip
    cases += [("compare", str(f.relative_to(whole / "run")), compare) for f in sorted((whole / "run" / "answers").glob("*.jsonl"))]
    cases += [("compare", "compare.json", compare)]
    references: dict[str, Any] = {}
    tallies: dict[str, Counter[str]] = defaultdict(Counter)
    examples: dict[str, str] = {}
    left: dict[str, Callable[[], Any]] = {
        "resume": lambda: steady(folder / "run"),
        "merge": lambda: tree(folder / "out"),
        "merge --which best": lambda: tree(folder / "out"),
        "compare": lambda: figures(folder / "run"),
    }
    for name, file, arguments in [("", "", []), *cases]:
        for how in DAMAGE if name else ():
            key = re.sub(r"step-\d+|trained-\w+|base-\w+|prompted\S*-\w+(?=\.jsonl)", "…", file)
            fresh(folder, whole, verbs()[1])
            if name not in references:
                code, text, _ = call(folder, arguments)
                assert code == 0, text
                references[name] = left[name]()
                fresh(folder, whole, verbs()[1])
            path, other = folder / "run" / file, whole / "other" / file
            if not other.is_file():
                similar = sorted((whole / "other" / Path(file).parent).glob(f"{Path(file).name.split('-')[0]}*"))
                other = similar[0] if similar else whole / "other" / "recipe.toml"
            if not path.is_file() or not damage(path, how, other, dice):
                continue
            code, text, _ = call(folder, arguments)
            where = f"{name}: {key}"
            named = any(part in text for part in {Path(file).name, *Path(file).parts[:-1]})
            if "Traceback" in text:
                outcome = "TRACEBACK"
            elif code == 2 and len(text.strip().splitlines()) >= 1 and "iqlite: " in text:
                outcome = "refused in a sentence"
            elif code != 0:
                outcome = "ANOTHER END"
            elif left[name]() == references[name]:
                outcome = "said, the same result" if "iqlite: " in text or "anew" in text or named else "not needed, the same result"
            else:
                outcome = "said, with a loss" if "iqlite: " in text and named else "ANOTHER RESULT IN SILENCE"
            tallies[where][outcome] += 1
            if outcome.isupper():
                details.append(f"{where} ({file}) {how}: {outcome}: {text[-1200:]}")
            said = [line for line in text.splitlines() if line.startswith("iqlite: ")]
            if said and where not in examples:
                examples[where] = said[0].replace(str(folder), "")
        if name:
            print(name, file, dict(tallies[f"{name}: {re.sub(r'step-[0-9]+|trained-[0-9a-z]+|base-[0-9a-z]+', '…', file)}"]), flush=True)
    for where, tally in tallies.items():
        outcomes = ", ".join(f"{count} {what}" for what, count in tally.items())
        rows.append(f"| {where} | {sum(tally.values())} | {outcomes} | {examples.get(where, '')[:230]} |")
    total = sum((tally for tally in tallies.values()), Counter())
    rows.append(f"| **all** | {total.total()} | {', '.join(f'{count} {what}' for what, count in total.items())} | |")
    print(rows[-1])


def main() -> None:
    if LIBRARY not in os.environ:
        again_with_the_library()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["kills", "full", "damage"])
    parser.add_argument("--only", default="", help="verbs with this in their name")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    for name in ("iqlite.training.opening", "iqlite.evaluation.compare", "iqlite.export.folder", "iqlite.export.gguf_file", "iqlite.export.distance", "trl"):  # once, not in each process  # fmt: skip
        with contextlib.suppress(ImportError):
            __import__(name)
    rows: list[str] = []
    damaged: list[str] = []
    details: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        folder, whole = Path(scratch) / "work", Path(scratch) / "whole"
        os.environ["IQLITE_CACHE"] = str(Path(scratch) / "cache")
        folder.mkdir()
        project(folder)
        for recipe, out in (("rude", "other"), ("kind", "run")):
            code, text, _ = call(folder, ["train", f"{recipe}.toml", "--out", out, "--no-safety"])
            assert code == 0, text
        for out in ("other", "run"):
            code, text, _ = call(folder, ["compare", out, "--count", "2", "--seeds", "1", "--no-safety", "--with", "ppo"])
            assert code == 0, text
        code, text, _ = call(folder, ["export", "run", "-o", "out", "--to", "hf"])
        assert code == 0, text
        whole.mkdir()
        shutil.copytree(folder / "run", whole / "run")
        (folder / "out").rename(whole / "out")
        (folder / "other").rename(whole / "other")
        compared = [*(whole / "run").glob("compare*.json"), *(whole / "run").glob("safety*.json")]
        assert compared
        for kind in ("kills", "full"):
            if kind in asked.what:
                wait_for_kills(folder, whole, kind, asked.only, asked.every, rows, details)
        if "damage" in asked.what:
            damaged_files(folder, whole, damaged, details)
    text = "| fault | times | wrong | lost |\n| --- | ---: | --- | --- |\n" + "\n".join(rows) if rows else ""
    text += (
        "\n\n| damaged, then | files | outcome | what is said (the first) |\n| --- | ---: | --- | --- |\n" + "\n".join(damaged)
        if damaged
        else ""
    )
    if asked.out:
        asked.out.write_text(text + "\n", "utf-8")
    print(text)
    print("\n".join(details))
    raise SystemExit(min(1, len(details)))


if __name__ == "__main__":
    main()
