"""Streamed layers: the same run to the bit, one pass of the weights for all readings of a step, on a CPU and on a played card whose copies come late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from iqlite.base.streaming import Mapped, Ring
from iqlite.errors import RecipeError
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import training_batches, update
from tests.card.driver import played
from tests.card.graphs import Stream
from tests.card.played import PlayedCard
from tests.helpers.tensors import tensors_of, training_rollout
from tests.helpers.tiny import shake

LAYERS = 5
NARROW = {"batch_tokens": 64, "max_grad_norm": 1e9, "steps": 2}  # several batches of each reading and of the update


def step(session: Session) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """(hidden states by reading, the adapter after a step of plain descent, passes of the weights in each part) of one rollout."""
    shake(session.policy)
    streamed, passes = session.policy.base.streamed, dict[str, float]()
    rollout = training_rollout(session)

    def count(part: str, before: int) -> None:
        if streamed is not None:
            passes[part] = (streamed.visits - before) / len(streamed.layers)

    before = streamed.visits if streamed else 0
    scores = read(session.policy, session.chat, rollout, session.readings, session.sizes, training_batches(session, rollout))
    count("read", before)
    before = streamed.visits if streamed else 0
    update(session, torch.optim.SGD(list(session.policy.parameters.values()), 1.0), rollout, scores, 1.0)
    count("update", before)
    return dict(scores.hidden), session.policy.state(), passes


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("architecture", "quantization", "objective"),
    [
        ("llama", "nf4", "full-kl"),
        ("llama", "nf4", "policy-gradient"),
        ("qwen2", "none", "full-kl"),
        ("gemma2", "nf4", "full-kl"),  # layers of two kinds
    ],
)
def test_a_step_is_the_same_to_the_bit_in_two_passes(
    architecture: str, quantization: str, objective: str, make_session: Callable[..., Session], tiny: Callable[..., Path]
) -> None:
    folder = str(tiny(architecture, num_hidden_layers=LAYERS))

    def session(offload: str) -> Session:
        model = {"base": folder, "quantization": quantization, "offload": offload}
        return make_session(model=model, train=NARROW | {"checkpointing": "off"}, objective={"name": objective})

    hidden, adapter, _ = step(session("none"))
    streamed = session("layers")
    again, trained, passes = step(streamed)
    assert isinstance(streamed.policy.base.streamed, Mapped)
    assert same(hidden, again)
    assert same(adapter, trained)
    assert passes["read"] == 1  # all readings, and the policy
    back = 1 - 1 / LAYERS  # the last layer is still there
    assert passes["update"] == pytest.approx(back if objective == "full-kl" else 2 + back)  # π_old is read before, and again


def test_layers_that_share_go_one_batch_at_a_time_and_come_to_the_same(
    make_session: Callable[..., Session], tiny: Callable[..., Path]
) -> None:
    """gemma4's last layers read other layers' keys: their backward pass can't be done layer by layer."""

    def session(offload: str) -> Session:
        return make_session(model={"base": str(tiny("gemma4_text")), "quantization": "none", "offload": offload}, train=NARROW)

    streamed = session("layers")
    assert streamed.policy.layerwise is None
    hidden, adapter, _ = step(session("none"))
    again, trained, _ = step(streamed)
    assert same(hidden, again)
    assert same(adapter, trained)


def test_weights_lie_in_a_file_without_a_name(make_session: Callable[..., Session], tiny: Callable[..., Path]) -> None:
    """All matrices of the base are views of mapped files; what a process has of its own are vectors and the adapter."""
    session = make_session(model={"base": str(tiny(num_hidden_layers=LAYERS)), "quantization": "nf4", "offload": "layers"})
    streamed = session.policy.base.streamed
    assert isinstance(streamed, Mapped)
    spans = [(torch.frombuffer(one, dtype=torch.uint8).data_ptr(), len(one)) for one in streamed.maps]
    own = [
        name
        for name, tensor in tensors_of(session.policy.model)
        if tensor.numel() >= 1000 and "lora" not in name and not any(start <= tensor.data_ptr() < start + size for start, size in spans)
    ]
    assert own == []
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "offload-" in line] if Path("/proc").exists() else []
    assert all(line.endswith("(deleted)") and " rw-s " in line for line in lines)


class Deaf(Stream):
    """A stream that waits for nobody."""

    def wait_event(self, event: Callable[[], None]) -> None:
        pass


@contextmanager
def card_that(copies: str) -> Iterator[PlayedCard]:
    """A played card. Copies beside the computation come as late as may be, or at once; or late, and nobody waits for them."""
    with played("RTX 4090", 24.0) as card, pytest.MonkeyPatch.context() as patch:
        if copies == "at once":
            patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        if copies == "not waited for":
            patch.setattr(torch.cuda, "current_stream", Deaf)
        yield card


def test_a_step_on_a_card_is_the_same_to_the_bit_through_a_ring(
    make_session: Callable[..., Session], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, with the layers' inputs in the computer's memory."""
    folder = str(tiny(num_hidden_layers=3))

    def run(offload: str, slots: int = 2, copies: str = "late") -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
        monkeypatch.setattr("iqlite.base.streaming.SLOTS", slots)
        with card_that(copies):
            model, rollout = {"base": folder, "quantization": "nf4", "offload": offload}, {"max_new_tokens": 2}
            session = make_session(model=model, train=NARROW, rollout=rollout)
            hidden, adapter, passes = step(session)
            if offload == "layers":
                assert passes["read"] == 1
            return hidden, adapter, session.policy.base.streamed

    hidden, adapter, _ = run("none")
    for slots, copies in ((2, "late"), (3, "at once")):
        again, trained, ring = run("layers", slots, copies)
        assert isinstance(ring, Ring)
        assert len(ring.slots) == slots
        assert same(hidden, again)
        assert same(adapter, trained)
    assert not same(adapter, run("layers", 2, "not waited for")[1])  # so the play would notice


def test_streamed_layers_need_iqlites_own_forwards(make_session: Callable[..., Session]) -> None:
    with pytest.raises(RecipeError, match=r"model\.offload"):
        make_session(model={"offload": "layers", "backend": "unsloth"})
