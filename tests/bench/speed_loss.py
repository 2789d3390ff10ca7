"""The loss of n response tokens on one side: by chunks, as iqlite does it, or plainly, with all [n, V] logits at once.

    python -m tests.bench.speed_loss --side chunked
    python -m tests.bench.speed_loss --side plain

Estimator `contrastive`, objective `full-kl`, random weights and states with logits of standard deviation 2. What is timed goes from hidden
states to their gradient. The plain side doesn't compute the per-token statistics that the chunked side returns. The last line is one JSON
object: seconds, and the memory above what was there before (resident, every 10 ms, or what CUDA's allocator counted).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from iqlite.base.loading import let_go_of_files
from iqlite.base.shape import Shape, known
from iqlite.device import here
from iqlite.machine.fit import choose
from iqlite.machine.memory import Work
from iqlite.method.estimators import contrastive
from iqlite.method.loss import Scoring, chunked_loss
from iqlite.method.objectives import full_kl
from iqlite.model.head import Head
from iqlite.recipe.reading import load_recipe
from iqlite.recipe.schema import readings_of
from iqlite.records import Chunk
from tests.bench.peers.common import CUDA, MIB, Gauge

RECIPE, MODEL = Path("recipes/cheerful-135m.toml"), "Qwen/Qwen2.5-7B-Instruct"
LOGIT_STD, APART = 2.0, 0.3  # standard deviation of the logits; how far, in hidden states of size 1, readings and policy differ
NAMES = ("reference", "wanted", "unwanted")


class FineGauge(Gauge):
    """Resident memory every 10 ms."""

    def _watch(self) -> None:
        process = psutil.Process()
        while not CUDA and not self._closed.wait(0.01):
            self.peak = max(self.peak, process.memory_info().rss)


def default_chunk_tokens() -> int:
    """What `train.chunk_tokens = "auto"` comes to."""
    shape = Shape.of(known()[MODEL], MODEL)
    device = here()[0].type
    return choose(shape, Work.of(load_recipe(RECIPE), shape, device), 2.0**40).widths.chunk_tokens


def random_inputs(n: int, vocabulary: int, width: int) -> tuple[Head, Tensor, Tensor, dict[str, Tensor]]:
    """(head, the policy's hidden states, sampled tokens, the readings' hidden states)."""
    torch.manual_seed(0)
    device, dtype = here()
    linear = nn.Linear(1, 1, bias=False)
    weight_VD = torch.empty(vocabulary, width, device=device, dtype=dtype).normal_(std=LOGIT_STD / width**0.5)
    linear.weight = nn.Parameter(weight_VD, requires_grad=False)
    hidden_nD = torch.randn(n, width, device=device, dtype=dtype)
    hidden = {name: hidden_nD + APART * torch.randn_like(hidden_nD) for name in NAMES}
    return Head(linear), hidden_nD, torch.randint(vocabulary, (n,), device=device), hidden


def chunked(head: Head, hidden_nD: Tensor, tokens_n: Tensor, hidden: dict[str, Tensor], chunk_tokens: int) -> Tensor:
    """The loss as iqlite computes it."""
    scoring = Scoring(contrastive, readings_of("contrastive"))
    total = len(tokens_n)
    return chunked_loss(head, hidden_nD, tokens_n, hidden, scoring, full_kl, total_tokens=total, chunk_tokens=chunk_tokens)[0]


def plain(head: Head, hidden_nD: Tensor, tokens_n: Tensor, hidden: dict[str, Tensor], _: int) -> Tensor:
    """The same loss with every logit of every token at once."""
    with torch.no_grad():
        logp_superior_nV = contrastive(*(head(hidden[name]) for name in NAMES))[0]
    return full_kl(Chunk(tokens_n, head(hidden_nD).log_softmax(-1), logp_superior_nV))[0].mean()


def loss_and_gradient(side: str, head: Head, hidden_nD: Tensor, tokens_n: Tensor, hidden: dict[str, Tensor], chunk_tokens: int) -> Tensor:
    """[loss, norm of its gradient in the hidden states]."""
    leaf_nD = hidden_nD.clone().requires_grad_()
    loss = (chunked if side == "chunked" else plain)(head, leaf_nD, tokens_n, hidden, chunk_tokens)
    loss.backward()
    assert leaf_nD.grad is not None
    return torch.stack([loss.detach().float(), leaf_nD.grad.float().norm()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["chunked", "plain"], required=True)
    parser.add_argument("--shape", nargs=3, type=int, default=[2048, 152064, 3584], metavar=("N", "V", "D"))
    parser.add_argument("--chunk-tokens", type=int, default=0, help='0: what a recipe\'s "auto" comes to')
    args = parser.parse_args()
    chunk_tokens = args.chunk_tokens or default_chunk_tokens()
    head, hidden_nD, tokens_n, hidden = random_inputs(*args.shape)
    loss_and_gradient(args.side, head, hidden_nD[:1], tokens_n[:1], {name: state_nD[:1] for name, state_nD in hidden.items()}, 1)  # warm-up
    let_go_of_files(nn.Module())  # gives back what making the weights and the warm-up freed
    with FineGauge() as gauge:
        start = time.perf_counter()
        loss, norm = loss_and_gradient(args.side, head, hidden_nD, tokens_n, hidden, chunk_tokens).tolist()
        seconds = time.perf_counter() - start
    result = {
        "side": args.side,
        "chunk_tokens": chunk_tokens if args.side == "chunked" else args.shape[0],
        "seconds": round(seconds, 3),
        "extra_mib": round((gauge.peak - gauge.loaded) / MIB, 1),
        "loss": loss,
        "gradient_norm": norm,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
