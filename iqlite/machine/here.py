"""This computer: what memory the memory model may plan with, and a card that isn't used."""

from __future__ import annotations

import os

import torch

from iqlite.device import free_memory, is_card
from iqlite.machine.memory import CONTEXT
from iqlite.machine.ranks import local_size
from iqlite.machine.timing import card_here


def unused_card() -> str:
    """Why a card of this computer isn't used, and what to do; empty if there is none, or if it was hidden on purpose."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or not (card := card_here()):
        return ""
    if torch.version.cuda is None:
        cause = f"this torch ({torch.__version__}) was built for CPUs only: install the CUDA build that PyTorch's own page names for your system"
    else:
        cause = f"torch {torch.__version__} can't reach it: update its driver, which must know CUDA {torch.version.cuda}"
    return f"{card[0]} isn't used, since {cause}. Going on without it."


def usable_memory(device: torch.device) -> float:
    """Bytes that a plan may fill on this device: a card's, or this process's share of the computer's memory.

    The driver's context, which a plan counts, is there already and isn't free any more.
    """
    return free_memory(device) + CONTEXT["cuda"] if is_card(device) else free_memory(device) / local_size()
