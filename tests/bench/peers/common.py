"""What the TRL peers share: command line, base and adapter, trainer options, and one clock and one memory gauge for the whole run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from iqlite.base.loading import let_go_of_files, train_on_any_cpu

CUDA = torch.cuda.is_available()
MIB = 2**20


def parser(description: str, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the base model, Hugging Face format")
    parser.add_argument("--prompts", required=True, type=Path, help="JSON lines with a `prompt` field")
    parser.add_argument("--steps", type=int, default=10, help="at least 2: the first isn't timed")
    parser.add_argument("--batch", type=int, default=8, help="responses per step")
    parser.add_argument("--new-tokens", type=int, default=32, help="longest response, tokens")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's choice")
    parser.add_argument("--out", default=out)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse(parser: argparse.ArgumentParser, least_batch: int = 1) -> argparse.Namespace:
    args = parser.parse_args()
    if args.steps < 2 or args.batch < least_batch:
        parser.error(f"--steps must be at least 2 and --batch at least {least_batch}")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def trainer_parts(args: argparse.Namespace, **columns: str) -> dict[str, Any]:
    """The trainer's arguments but for its config: base, tokenizer, adapter, and a row for every prompt with `columns` added."""
    dtype = torch.bfloat16 if CUDA else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": 0} if CUDA else None}
    if args.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text("utf-8").splitlines() if line.strip()]
    return {
        "model": AutoModelForCausalLM.from_pretrained(args.model, **options),
        "processing_class": AutoTokenizer.from_pretrained(args.model),
        "train_dataset": Dataset.from_list([{"prompt": [{"role": "user", "content": text}], **columns} for text in prompts]),
        "peft_config": LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    }


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    return dict(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        max_completion_length=args.new_tokens,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        gradient_checkpointing=args.checkpointing,
        bf16=CUDA,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )


class Clock(TrainerCallback):
    """When each step ended: from one end to the next lies the whole step, generation and batch preparation included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


class Gauge:
    """Bytes at the start and the most while open: resident memory every 20 ms, or what CUDA's allocator counted."""

    def __enter__(self) -> Gauge:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        self.loaded = self.peak = torch.cuda.memory_allocated() if CUDA else psutil.Process().memory_info().rss
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not CUDA and not self._closed.wait(0.02):
            self.peak = max(self.peak, process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if CUDA:
            self.peak = torch.cuda.max_memory_allocated()


def settle(model: Any) -> None:
    """On a CPU: a float32 adapter (GRPOTrainer makes it bfloat16 over NF4), a base that can be trained, and no mapped weights."""
    if CUDA:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    train_on_any_cpu(model)
    let_go_of_files(model)


def measure(trainer: Any, peer: str, args: argparse.Namespace, *, save: bool = False) -> None:
    """Trains and prints one JSON line; the first step is left out of times and tokens."""
    clock = Clock()
    trainer.add_callback(clock)
    settle(trainer.model)
    with Gauge() as gauge:
        trainer.train()
    if save:
        trainer.save_model(args.out)
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row][1:]
    result = {
        "peer": peer,
        "steps": args.steps,
        "seconds_per_step": round(statistics.median(seconds), 3),
        "response_tokens_per_second": round(args.batch * sum(lengths) / sum(seconds), 2),
        "mean_response_tokens": round(statistics.fmean(lengths), 1),
        "loaded_mib": round(gauge.loaded / MIB),
        "peak_mib": round(gauge.peak / MIB),
        "growth_mib": round((gauge.peak - gauge.loaded) / MIB),
    }
    print(json.dumps(result), flush=True)
