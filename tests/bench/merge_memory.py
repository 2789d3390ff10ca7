"""What `iqlite merge` takes beside the largest shard: a 7B-shaped base of random bfloat16 weights in 8 shards, a LoRA of rank 16 on it.

    python -m tests.bench.merge_memory [--work DIR] [--shape llama-2-7b] [--shards 8] [--base trained|stored]

The disk under --work (the system's temporary folder by default) needs twice the model: 27 GB for 7B. Each merge runs in a process of its
own, once sampled every 10 ms (anonymous memory is the process's own; file pages belong to the disk's cache and can be dropped at any time) and once under
RLIMIT_DATA = what stands after the imports + the largest shard (the address range that maps one counts as data) + --constant: whether it gets
through is the answer. Linux only.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iqlite.base.names import EMBEDDED
from iqlite.export.merge import write_safetensors
from tests.bench.plan_error import CONFIGS

RANK, STD = 16, 0.02
GIB = 2**30


def make_base(folder: Path, config: dict[str, Any], shards: int) -> int:
    """A model folder with random weights, layer by layer; returns the bytes of its largest shard."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto import CONFIG_MAPPING

    from iqlite.base.names import locate

    options = dict(config)
    settings = CONFIG_MAPPING[options.pop("model_type")](**options, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    folder.mkdir(parents=True)
    settings.save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate(EMBEDDED)).save_pretrained(folder)
    total, size = sum(2 * torch.Size(shape).numel() for shape in shapes.values()), 0
    parts: list[dict[str, Any]] = [{}]
    for name, shape in shapes.items():
        if size >= total / shards * len(parts) and len(parts) < shards:
            parts.append({})
        parts[-1][name] = (torch.bfloat16, shape)
        size += 2 * torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(0)

    def drawn(part: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        for name, (dtype, shape) in part.items():
            yield name, torch.ones(shape, dtype=dtype) if len(shape) == 1 else torch.empty(shape, dtype=dtype).normal_(0, STD, generator=generator)  # fmt: skip

    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file, part, drawn(part))
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}), "utf-8")
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def make_adapter(folder: Path, base: Path) -> None:
    """A LoRA on every linear layer of the base's decoder, in PEFT format."""
    from safetensors.torch import save_file

    from iqlite.export.stored import Stored

    stored = Stored.find(str(base))
    folder.mkdir()
    shapes: dict[str, Any] = {}
    for shard, names in stored.shards.items():
        with stored.opened(shard) as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in names}
    state = {}
    for name in sorted(stored.linear):
        out, width = shapes[name]
        key = f"base_model.model.{name.removesuffix('.weight')}"
        state[f"{key}.lora_A.weight"] = torch.randn(RANK, width) / width**0.5
        state[f"{key}.lora_B.weight"] = torch.randn(out, RANK) * 0.01
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}), "utf-8")
    stored.identity().write(folder)


def status() -> dict[str, int]:
    """This process's memory by kind, bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0] in ("VmRSS:", "RssAnon:", "VmData:", "VmHWM:")}


class Sampled:
    """Peaks of anonymous, resident and data memory, every 10 ms."""

    def __enter__(self) -> Sampled:
        self.peaks, self.running = status(), True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peaks = {key: max(value, self.peaks[key]) for key, value in status().items()}
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def merge_here(work: Path, base: str, limit: int) -> dict[str, Any]:
    """One merge in this process; `limit` bytes of data over what the imports took, 0 for none."""
    from iqlite.export.folder import chat_of, write_folder
    from iqlite.export.merge import Merge
    from iqlite.export.stored import Stored

    torch.addmm(torch.ones(512, 512), torch.ones(512, 512), torch.ones(512, 512))  # the threads and their buffers are there
    before = status()
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (before["VmData"] + limit,) * 2)
    start = time.perf_counter()
    with Sampled() as sampled:
        stored = Stored.find(str(work / "base"))
        merge = Merge(stored, work / "adapter", nf4=base == "trained")
        write_folder(work / "merged", merge, chat_of(stored), {})
    return (
        {"seconds": time.perf_counter() - start}
        | {key: value - before[key] for key, value in sampled.peaks.items()}
        | {"imports": before["VmRSS"]}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the models; what is there already is used again")
    parser.add_argument("--shape", default="llama-2-7b", choices=list(CONFIGS))
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--base", nargs="+", choices=["trained", "stored"], default=["trained", "stored"])
    parser.add_argument("--constant", type=float, default=1.0, help="GiB that RLIMIT_DATA grants beside the largest shard")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/merge_memory.json"))
    parser.add_argument("--here", type=int, help="merge in this process under this limit and print its JSON")
    args = parser.parse_args()
    if args.here is not None:
        print(json.dumps(merge_here(args.work, args.base[0], args.here)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        if not (work / "base").is_dir():
            make_base(work / "base", CONFIGS[args.shape], args.shards)
            make_adapter(work / "adapter", work / "base")
        largest = max(file.stat().st_size for file in (work / "base").glob("*.safetensors"))
        rows = []
        for base in args.base:
            for limit in (0, largest + int(args.constant * GIB)):
                command = [sys.executable, "-m", "tests.bench.merge_memory", "--work", str(work), "--base", base, "--here", str(limit)]
                done = subprocess.run(command, capture_output=True, text=True)
                shutil.rmtree(work / "merged", ignore_errors=True)
                row = {"base": base, "limit": limit, "largest_shard": largest, "through": done.returncode == 0}
                row |= json.loads(done.stdout.strip().splitlines()[-1]) if row["through"] else {"error": done.stderr.strip()[-500:]}
                rows.append(row)
                print(json.dumps(row), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print(f"largest shard {largest / GIB:.3f} GiB")
    for row in rows:
        how = f"RLIMIT_DATA of the imports + the shard + {args.constant:g} GiB" if row["limit"] else "sampled"
        found = f"anonymous {row['RssAnon'] / GIB:.3f}, resident {row['VmRSS'] / GIB:.3f} GiB over the imports, {row['RssAnon'] / largest:.2f} and {row['VmRSS'] / largest:.2f} of the largest shard, {row['seconds']:.0f} s" if row["through"] else "didn't get through"  # fmt: skip
        print(f"--base {row['base']}, {how}: {found}")


if __name__ == "__main__":
    main()
