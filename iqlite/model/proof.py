"""A model that iqlite has never met is proved on a dozen tokens before anything is trained.

What was found in it (`base.anatomy`) must say what the model says itself: the head's logits are the model's own; with the adapters off the
model is the bare one; rows read together, padded, behind a shared prefix, or decoded token by token, come to what each comes to alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iqlite.base.anatomy import FAULTS
from iqlite.base.loading import Base
from iqlite.errors import BaseError, first_line
from iqlite.model.decoding import draw
from iqlite.model.forward import Forward
from iqlite.model.head import Head
from iqlite.model.sampling import Sampler

PROVED = frozenset(f"{name}ForCausalLM" for name in ["Llama", "Qwen2", "Mistral", "Gemma", "Gemma2", "Olmo2", "Granite", "Cohere"])
"""Classes that the suite proves with every layer's numbers, so that loading them needn't."""
TEXT = "Name three things that a good friend would never say to you, and then one that they would."
TOKENS = 12
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 8e-2}  # of the largest number; sums in another order differ so much


def is_proved(model: Any) -> bool:
    """True for a model of a class that the suite proves."""
    return type(model).__name__ in PROVED


@dataclass(frozen=True)
class Bare:
    """What the model itself says of a few tokens before anything stands on it."""

    ids: list[int]
    states_LD: Tensor
    logits_LV: Tensor

    @classmethod
    def of(cls, base: Base) -> Bare:
        """From one forward of the whole model; BaseError if that fails."""
        ids = list(base.tokenizer(TEXT, add_special_tokens=False).input_ids)
        ids = (ids * TOKENS)[:TOKENS] or [1] * TOKENS
        given, seen = torch.tensor([ids], device=base.device), []
        hook = base.anatomy.decoder.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state[0]))
        base.model.eval()
        try:
            with torch.no_grad():
                logits_LV = base.model(input_ids=given, use_cache=False).logits[0].float()
            states_LD = seen[-1]
        except torch.OutOfMemoryError:
            raise
        except FAULTS as error:
            raise BaseError(_sentence(base, f"it can't read {TOKENS} tokens ({first_line(error)})")) from None
        finally:
            hook.remove()
        return cls(ids, states_LD, logits_LV)

    def rows(self) -> tuple[list[list[int]], list[list[int]], int]:
        """Two rows of unequal length and their answers, and how wide those are."""
        return [self.ids[:8], self.ids[:5]], [self.ids[8:], self.ids[5:8]], 4


def prove(base: Base, bare: Bare, head: Head, forward: Forward) -> tuple[str, ...]:
    """Holds head and forward, the adapters off, against `bare`; changes to transformers' own cache where plain keys and values don't do.

    Decoding by equal steps is proved after all that, and left out where it differs. Returns what to tell the user. BaseError says which proof a
    model fails.
    """
    dtype = base.compute_dtype
    steady, forward.steady = forward.steady, False
    if _apart(head(bare.states_LD), bare.logits_LV, dtype):
        raise BaseError(_sentence(base, "its logits aren't its head's product: something comes after it that iqlite doesn't know"))
    if forward.plain and _differs(forward, bare, len(bare.logits_LV[0]), dtype):
        forward.plain = False
        forward.forget_prefixes()
    if wrong := _differs(forward, bare, len(bare.logits_LV[0]), dtype):
        raise BaseError(_sentence(base, wrong))
    if forward.plain:
        forward.steady = steady
        forward.steady = steady and _differs(forward, bare, len(bare.logits_LV[0]), dtype) is None
        return ()
    return (f"{base.name} has layers that keep more than keys and values: each row is read whole, which is slower than sharing prefixes.",)


def prove_training(base: Base, evaluated_BTD: Tensor, trained_BTD: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Holds what the policy reads in training against what it reads in evaluation, and that each adapter gets a gradient from it.

    For another maker's forwards: they may drop masks, or recompute what nothing flows back through. BaseError says what is wrong.
    """
    if _apart(trained_BTD, evaluated_BTD, base.compute_dtype):
        raise BaseError(_sentence(base, "in training it reads something else than in evaluation"))
    trained_BTD.float().square().sum().backward()  # type: ignore[no-untyped-call]
    reached = [name for name, parameter in parameters.items() if parameter.grad is not None and bool(parameter.grad.any())]
    for parameter in parameters.values():
        parameter.grad = None
    if lacking := [name for name in parameters if "lora_B" in name and name not in reached]:  # A has none while B is 0
        raise BaseError(_sentence(base, f"no gradient reaches {len(lacking)} of its adapters"))


def _differs(forward: Forward, bare: Bare, vocabulary: int, dtype: torch.dtype) -> str | None:
    """What of the ways to read and decode gives other states than the bare model; None if none does."""
    ids = bare.ids
    rows, answers, width = bare.rows()
    wanted = [bare.states_LD[7 : TOKENS - 1], bare.states_LD[4:7]]
    try:
        alone = forward.hidden_states(rows[:1], answers[:1], width)[0]
        if _apart(alone, wanted[0], dtype):
            return "with the adapters off it isn't the bare model"
        ways: tuple[tuple[list[list[int]], str], ...] = (
            ([], "rows read together differ from rows read alone"),
            ([ids[:3]] * 2, "a prefix that rows share changes them"),
        )
        for shared, fault in ways if forward.plain else ways[:1]:
            together = forward.hidden_states(rows, answers, width, shared)
            if _apart(together[0], wanted[0], dtype) or _apart(together[1][:3], wanted[1], dtype):
                return fault
            for found, right in zip(_decoded(forward, rows, answers, shared[0] if shared else (), vocabulary), wanted, strict=True):
                if _apart(found, right, dtype):
                    return "a row decoded token by token differs from the same row read at once"
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        return f"its layers can't be read with a cache ({type(error).__name__}: {first_line(error)})"
    return None


def _decoded(
    forward: Forward, rows: Sequence[list[int]], answers: Sequence[list[int]], shared: Sequence[int], vocabulary: int
) -> list[Tensor]:
    """The states that predict each row's answer, decoded by the one loop, which is made to draw these answers."""
    stop = next(token for token in range(vocabulary) if not any(token in answer for answer in answers))
    states: list[list[Tensor]] = [[] for _ in rows]

    def predict(found: Mapping[str, Tensor]) -> Tensor:
        logits_bV = torch.zeros(len(rows), vocabulary, device=forward.device)
        for row, answer in enumerate(answers):
            at = len(states[row])
            states[row].append(found["plain"][row])
            logits_bV[row, answer[at] if at < len(answer) else stop] = 1.0
        return logits_bV

    sampler = Sampler(seed=0, max_new_tokens=max(map(len, answers)), temperature=0.0)  # so that none leaves before the last token
    for _ in draw(forward, {"plain": rows}, {"plain": shared}, predict, [stop], sampler, 0, range(len(rows)), record=False):
        pass
    return [torch.stack(found[: len(answer)]) for found, answer in zip(states, answers, strict=True)]


def _apart(found: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    found, right = found.float(), right.float()
    return not bool((found - right).abs().max() <= TOLERANCE[dtype] * right.abs().max())


def _sentence(base: Base, wrong: str) -> str:
    kind = base.anatomy.config.model_type
    return f"base {base.name!r} ({kind}, {type(base.model).__name__}) can't be trained here: {wrong}; choose another base."
