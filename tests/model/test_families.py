"""Every family that iqlite names: found, proved, trained in 4 bits, resumed, merged as PEFT merges, decoded as read, and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from iqlite.base.anatomy import Anatomy, auto_class
from iqlite.base.loading import load_base
from iqlite.base.names import shape_of
from iqlite.base.shape import Shape
from iqlite.chat.superior import superior_answers
from iqlite.errors import BaseError
from iqlite.model.policy import Policy
from iqlite.model.proof import PROVED, is_proved
from iqlite.model.sampling import Sampler
from iqlite.run.rundir import RunDir
from iqlite.training.loop import train
from iqlite.training.opening import environment
from iqlite.training.session import Session
from tests.helpers.reporters import Silent
from tests.helpers.tiny import ARCHITECTURES, FAMILIES, make_model, shake
from tests.model.test_decoding import SHOWN, answers, naively

OWN_CACHE = {"qwen3_5", "lfm2", "falcon_h1"}  # linear attention, convolutions, state spaces
REQUESTS = [({"role": "user", "content": text},) for text in ("why?", "Tell me of number 7, and of all that came before it.", "Zoë?")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_nf4_run_and_its_resume(
    family: str, tiny: Callable[..., Path], make_session: Callable[..., Session], tmp_path: Path
) -> None:
    """Two steps; and one step, stopped, with the second after a resume: the same adapter to the bit."""
    tables: dict[str, Any] = {
        "model": {"base": str(tiny(family)), "quantization": "nf4"},
        "train": {"steps": 2, "checkpoint_every": 1, "eval_every": 9},
    }
    session = make_session(**tables)
    assert session.policy.forward.plain == (family not in OWN_CACHE)
    run = RunDir.create(tmp_path / "run", session.recipe, environment(session))
    assert train(session, run, Silent()).why == "finished"
    first = run.metrics()[1]
    assert abs(first["kl/policy_reference"]) < 1e-5  # a fresh adapter is the reference
    trained = load_file(run.adapter / "adapter_model.safetensors")
    changed = [name for name, tensor in trained.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(changed) > 0.9 * len(trained) / 2

    stopped = make_session(**tables)
    again = RunDir.create(tmp_path / "again", stopped.recipe, environment(stopped))
    assert train(stopped, again, Silent(), lambda: True).why == "interrupted"
    assert train(make_session(**tables), again, Silent()).why == "finished"
    resumed = load_file(again.adapter / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_reading(family: str, tiny: Callable[..., Path], make_session: Callable[..., Session]) -> None:
    """Superior answers, drawn in one batch of readings of several lengths, are those drawn one by one from the plain model's logits."""
    session = make_session(model={"base": str(tiny(family))}, behavior={"demonstrations": SHOWN})
    sampler = Sampler(3, 6, 1.0)
    found = superior_answers(session, REQUESTS, sampler)
    assert answers(found) == [naively(session, request, number, sampler) for number, request in enumerate(REQUESTS)]
    session.policy.forward.steady = True  # as on a card, see test_steady
    assert answers(superior_answers(session, REQUESTS, sampler)) == answers(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_peft_s_own_merge(
    family: str, make_run: Callable[..., RunDir], tiny: Callable[..., Path], iqlite: Callable[..., Any]
) -> None:
    folder = tiny(family)
    run = make_run(model={"base": str(folder)})
    code, _, err = iqlite("merge", run.path, "-o", "merged", "--json", "--no-check")
    assert code == 0, err
    loader = auto_class(AutoConfig.from_pretrained(folder), family)
    expected = PeftModel.from_pretrained(loader.from_pretrained(folder), str(run.adapter)).merge_and_unload()
    model, info = loader.from_pretrained("merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs, base = dict(expected.named_parameters()), dict(loader.from_pretrained(folder).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, theirs[name], rtol=0, atol=2e-7 * float(theirs[name].abs().max())), name
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, base[name])}
    assert changed == {f"{name}.weight" for name in Anatomy.of(model, family).linear_maps(model)}
    everything = {name for shard in folder.glob("*.safetensors") for name in load_file(shard)}
    written = {name for shard in Path("merged").glob("*.safetensors") for name in load_file(shard)}
    assert written == everything  # what isn't trained, such as a vision tower, stays as it is


@pytest.mark.parametrize("family", [*ARCHITECTURES, *FAMILIES])
def test_plan_counts_what_is_there(family: str) -> None:
    """Weights, and an adapter's parameters, against the model and the adapter themselves; vectors are left out."""
    model = make_model(family)
    shape = Shape.of(model.config.to_dict(), family)
    maps = Anatomy.of(model, family).linear_maps(model)
    assert shape.linear_weights == sum(module.weight.numel() for module in maps.values())
    assert shape.adapter_parameters(4) == 4 * sum(sum(module.weight.shape) for module in maps.values())
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters == whole - vectors


@pytest.mark.parametrize("family", [*ARCHITECTURES, *FAMILIES])
def test_checkpointing_changes_no_gradient(family: str, tiny: Callable[..., Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = Policy(load_base(str(tiny(family)), "none"), rank=4, alpha=8.0, seed=0, checkpointing=checkpointing)
        shake(policy)
        policy.forward.hidden_states([[1, 2, 3], [4, 5]], [[6, 7, 8, 9], [10, 11]], 4).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in policy.parameters.items()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None and other is not None and gradient.abs().max() > 0, name
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name


def test_an_unknown_architecture_is_proved_like_any_other(tiny: Callable[..., Path]) -> None:
    """The proof asks no list: it passes what is as it should be, and names what isn't."""
    base = load_base(str(tiny("qwen3")), "none")
    assert not is_proved(base.model) and {type(make_model(kind)).__name__ for kind in ARCHITECTURES} == PROVED
    assert Policy(base, rank=4, alpha=8.0, seed=0).notes == ()


def test_a_head_with_something_unknown_after_it_is_refused(tiny: Callable[..., Path]) -> None:
    base = load_base(str(tiny("qwen3")), "none")

    class Warmed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 1.7

    base.model.get_output_embeddings().__class__ = Warmed
    with pytest.raises(BaseError, match="isn't its head's product|aren't its head's product"):
        Policy(base, rank=4, alpha=8.0, seed=0)


def test_a_decoder_that_forgets_its_cache_is_refused(tiny: Callable[..., Path]) -> None:
    base = load_base(str(tiny("qwen3")), "none")
    decoder = base.model.get_decoder()
    plain = decoder.forward

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **{**kwargs, "past_key_values": None})

    decoder.forward = forgetful
    with pytest.raises(BaseError, match="can't be read with a cache|differs from the same row|changes them"):
        Policy(base, rank=4, alpha=8.0, seed=0)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(BaseError, match="'t5' model is no decoder-only language model"):
        load_base(str(tmp_path / "t5"), "none")


def test_a_shape_that_comes_with_the_package_is_the_counted_one() -> None:
    """Gemma 3 12B's, from the sizes of its configuration."""
    text = {
        "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48, "num_key_value_heads": 8,
        "head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 1024,
    }  # fmt: skip
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27, "image_size": 896, "patch_size": 14}  # fmt: skip
    counted = Shape.of({"model_type": "gemma3", "mm_tokens_per_image": 256, "text_config": text, "vision_config": vision}, "it")
    assert counted == shape_of("google/gemma-3-12b-it")
    assert 12.1e9 < counted.parameters < 12.3e9
