"""Several processes that train one adapter, one a card, as torchrun or accelerate starts them: who does which rows, and what they tell each other.

Every process runs the whole program. What is shared out are rows: of a step's prompts, of an evaluation's, of a look's; each process does its own
and all get the results of all, in the order of the prompts, so that what follows (metrics, monitors, the optimizer's step) is the same everywhere.
The process of rank 0 leads: it alone writes and prints.

All of it goes through the computer's memory, by gloo: ids, a few numbers a token, and once an update the adapter's gradient. So no card gives
memory to NCCL's buffers, a process that dies ends its peers' waits at once, and a CPU runs the same code. No pickles: tensors travel as
safetensors, all else as JSON. Every verb imports this: nothing large at the top.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from iqlite.errors import BaseError, RecipeError, RunError, first_line
from iqlite.machine.watch import own_stderr

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from iqlite.machine.watch import Watch
    from iqlite.recipe.schema import Recipe

Thing = TypeVar("Thing")
MEETING = timedelta(minutes=10)  # until all have come, with their imports
UNMET = 8.0  # seconds before one that hasn't met the leader yet speaks for itself
ALIKE = 1.0  # seconds that one that has leaves to the leader
WAITING = timedelta(days=30)  # for a result: a rollout takes as long as it takes; `Watch` notices who is no more


def rank() -> int:
    """This process's number, 0 for one that was started alone."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes the launcher started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(size()))) if size() > 1 else 1


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if size() > 1 else 0


def launched_by() -> list[str]:
    """The words that start iqlite as it was started; on several machines, on each of them, with that machine's options."""
    if size() == 1:
        return ["iqlite"]
    if any(name.startswith("ACCELERATE_") for name in os.environ):
        return ["accelerate", "launch", "--multi_gpu", "--num_processes", str(size()), "-m", "iqlite"]
    return ["torchrun", "--nproc-per-node", str(local_size()), "-m", "iqlite"]


def check_enough(recipe: Recipe, processes: int) -> None:
    """RecipeError where one of so many processes would have nothing to do. Before anything is loaded or written."""
    prompts = recipe.rollout.prompts_per_step + recipe.contrary_per_step
    if processes > prompts:
        raise RecipeError(
            f"{recipe.path}: {processes} processes share out a step of {prompts} prompts, so {processes - prompts} would have nothing to do: "
            f"raise rollout.prompts_per_step ({recipe.rollout.prompts_per_step}), or start at most {prompts}."
        )


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of a run, as one of them sees it. Alone, everything is its own and nothing is sent."""

    rank: int = 0
    size: int = 1
    first_here: bool = True  # the first on this machine
    group: Any = None
    watch: Watch | None = None

    @property
    def leads(self) -> bool:
        """True in the one process that writes and prints."""
        return self.rank == 0

    def mine(self, costs: Sequence[float]) -> list[int]:
        """Which of some rows are this process's, by what they cost: longest first, dealt out to and fro, so that all have as many and as long ones."""
        order = sorted(range(len(costs)), key=lambda row: -costs[row])
        turns = [*range(self.size), *reversed(range(self.size))]
        return sorted(row for at, row in enumerate(order) if turns[at % len(turns)] == self.rank)

    def in_order(self, tensors: Mapping[str, Tensor], rows: Sequence[int], lengths: Sequence[int]) -> dict[str, Tensor]:
        """Everyone's tensors in the order of the rows. Here, each tensor holds `lengths[i]` entries of row `rows[i]`, one row's after the other's.

        What a process has no tensor for is zeros there.
        """
        if self.size == 1:
            return dict(tensors)
        import torch

        pieces: dict[int, tuple[int, dict[str, Tensor]]] = {}
        like: dict[str, Tensor] = {}
        for said, theirs in self._all(_packed({"rows": list(rows), "lengths": list(lengths)}, tensors)):
            at = 0
            like |= theirs
            for row, length in zip(said["rows"], said["lengths"], strict=True):
                pieces[row] = length, {name: tensor[at : at + length] for name, tensor in theirs.items()}
                at += length
        return {
            name: torch.cat(
                [some[name] if name in some else like[name].new_zeros((length, *like[name].shape[1:])) for _, (length, some) in sorted(pieces.items())]
            )
            for name in like
        }  # fmt: skip

    def spread(self, costs: Sequence[float], work: Callable[[list[int]], Sequence[float]]) -> list[float]:
        """A number for each of some rows, which `work` finds for those that it is given."""
        rows = self.mine(costs)
        found = work(rows) if rows or self.size == 1 else []
        if self.size == 1:
            return list(found)
        import torch

        values: list[float] = self.in_order({"": torch.tensor(list(found), dtype=torch.float64)}, rows, [1] * len(rows))[""].tolist()
        return values

    def told(self, value: Thing) -> Thing:
        """The leader's value, which JSON can say."""
        told: Thing = self.handed({}, value)[1]
        return told

    def handed(self, tensors: Mapping[str, Tensor], value: Any = None) -> tuple[dict[str, Tensor], Any]:
        """The leader's tensors and value."""
        if self.size == 1:
            return dict(tensors), value
        import torch
        import torch.distributed as dist

        packet = _packed(value, tensors) if self.leads else None
        length = torch.tensor([0 if packet is None else packet.numel()])
        self._do(lambda: dist.broadcast(length, 0, group=self.group))
        packet = torch.empty(int(length), dtype=torch.uint8) if packet is None else packet
        self._do(lambda: dist.broadcast(packet, 0, group=self.group))
        value, tensors = _unpacked(packet)
        return dict(tensors), value

    def gathered(self, value: Thing) -> list[Thing]:
        """Every process's value, which JSON can say, by rank."""
        return [value] if self.size == 1 else [theirs for theirs, _ in self._all(_packed(value, {}))]

    def total(self, number: int) -> int:
        """The sum of everyone's."""
        return sum(self.gathered(number))

    def least(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Each number as small as any process has it."""
        everyone_s = self.gathered(dict(numbers))
        return {name: min(theirs[name] for theirs in everyone_s) for name in numbers}

    def add_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Makes every parameter's gradient the sum of everyone's: one flat float32 sum, the same to the bit in all processes."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        trained = list(parameters)
        flat_N = torch.zeros(sum(parameter.numel() for parameter in trained))
        parts = list(zip(trained, torch.split(flat_N, [parameter.numel() for parameter in trained]), strict=True))
        for parameter, part_n in parts:
            if parameter.grad is not None:
                part_n.copy_(parameter.grad.reshape(-1))
        self._do(lambda: dist.all_reduce(flat_N, group=self.group))
        for parameter, part_n in parts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(part_n.view_as(parameter))

    def check_same(self, things: Mapping[str, Any]) -> None:
        """RunError unless all processes have the same recipe, prompts and base (named `things`): machines have their own files."""
        mine = json.loads(json.dumps(things))  # as the others' come
        for other, theirs in enumerate(self.gathered(mine)):
            for name, own in mine.items():
                if theirs[name] != own:
                    raise RunError(
                        f"processes {self.rank} and {other} have not the same {name}: give every machine the same files and the same iqlite."
                    )

    def leave(self) -> None:
        """Waits until all are done; from here on a process that ends is no fault."""
        if self.watch is not None:
            self.gathered(None)
            self.watch.over()

    def fault(self, text: str, code: int) -> None:
        """Ends all processes with one message, if there are several; else nothing happens."""
        if self.watch is not None:
            if not self.leads:  # most likely all have met the same, and the leader says it
                time.sleep(ALIKE)
            self.watch.fault(text if self.leads else f"process {self.rank}: {text}", code)

    def _all(self, packet: Tensor) -> list[tuple[Any, dict[str, Tensor]]]:
        """Every process's packet, opened, by rank."""
        import torch
        import torch.distributed as dist

        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        self._do(lambda: dist.all_gather(lengths, torch.tensor([packet.numel()]), group=self.group))
        longest = int(max(lengths))
        padded = torch.cat([packet, packet.new_zeros(longest - packet.numel())])
        packets = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        self._do(lambda: dist.all_gather(packets, padded, group=self.group))
        return [_unpacked(one[: int(length)]) for one, length in zip(packets, lengths, strict=True)]

    def _do(self, exchange: Callable[[], object]) -> None:
        """An exchange with the others; where one of them is no more, all end, and one says why."""
        try:
            exchange()
        except RuntimeError:  # gloo's words for a closed connection
            assert self.watch is not None
            self.watch.fault(self.watch.why(), 1)


ALONE = Ranks()


@functools.cache
def join() -> Ranks:
    """The processes that the launcher started, once they have met; `ALONE` where it started one. Sets this process's card."""
    if size() == 1:
        return ALONE
    import torch
    import torch.distributed as dist

    from iqlite.machine.watch import Watch

    _take_card(torch.cuda)
    try:
        dist.init_process_group("gloo", timeout=MEETING)
        group = dist.new_group(backend="gloo", timeout=WAITING)
    except (RuntimeError, ValueError) as error:  # an address that nobody answers at, a port in use
        raise RunError(
            f"the {size()} processes can't reach each other ({first_line(error)}): start them with torchrun or accelerate launch, with one --rdzv-endpoint that all machines reach."
        ) from None
    return Ranks(rank(), size(), local_rank() == 0, group, Watch(rank(), size()))


def fault(text: str, code: int) -> None:
    """What ends this process: with several, all end, and it is said once. Returns where this one is to say it itself."""
    if join.cache_info().currsize:
        join().fault(text, code)
    elif rank() > 0:
        time.sleep(UNMET)  # most likely the leader says the same, and the launcher ends this one
        os.write(own_stderr(), f"iqlite: process {rank()}: {text}\n".encode(errors="replace"))


def _take_card(cuda: Any) -> None:
    """A card for each process of this machine, in the order of their numbers; one that sees a single card takes it."""
    here = local_rank()
    cards = cuda.device_count() if cuda.is_available() else 0
    if cards > 1:
        if here >= cards:
            raise BaseError(f"{local_size()} processes were started and this machine has {cards} cards: start one process a card.")
        cuda.set_device(here)


def _packed(value: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """A value and tensors as bytes [N]."""
    import torch
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"value": json.dumps(value)})
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _unpacked(packet: Tensor) -> tuple[Any, dict[str, Tensor]]:
    from safetensors.torch import load

    data = packet.numpy().tobytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["value"]), load(data)
