"""One base model, four roles: LoRA adapters on it are toggled, never copied. The only module that toggles adapters.

policy = base with the trained adapter; reference = the bare base, every adapter off; ema = a slow average of the adapter; a frozen
adapter by its name. `with policy.acting_as(role):` is for scoring and sampling: evaluation mode, no gradient, restored on exit.
Outside such a block the model is the policy, in training mode, with gradients in exactly the pinned list of adapter parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

from iqlite.base import unsloth
from iqlite.base.anatomy import auto_class
from iqlite.base.identity import check_adapter
from iqlite.base.loading import Base
from iqlite.base.names import hub_name
from iqlite.errors import AdapterError, first_line
from iqlite.model.forward import Batch, Forward
from iqlite.model.head import Head
from iqlite.model.joined import joined
from iqlite.model.layerwise import Layerwise, goes
from iqlite.model.linear import folded as into_one
from iqlite.model.linear import is_adapted, make_lean
from iqlite.model.proof import Bare, is_proved, prove, prove_training
from iqlite.model.tuples import TupleForward

LOADING = """\
# A LoRA adapter of {base}

In PEFT's format; it needs its base and not iqlite:

```python
from peft import PeftModel
from transformers import {loader}, AutoTokenizer

base = {loader}.from_pretrained("{base}")  # a base that was a GGUF file: its original folder or hub id
model = PeftModel.from_pretrained(base, "this folder")
tokenizer = AutoTokenizer.from_pretrained("{base}")
```

iqlite itself writes a model card with figures: `iqlite export RUN --to peft -o FOLDER`.
"""
MOVING = (None, "policy", "ema")  # roles whose weights change from step to step
TRAINED = "default"  # PEFT's own name for an adapter stored at the root of its folder
LOSS_SCALE_FLOAT16 = 1024.0  # keeps hidden-state gradients above float16's smallest numbers; our choice


class Policy:
    """The base with its adapters, the optimizer's pinned parameters, and the head."""

    def __init__(
        self,
        base: Base,
        *,
        rank: int,
        alpha: float,
        seed: int,
        start: Path | None = None,
        checkpointing: bool = False,
        offload: bool = False,
    ):
        """Puts a fresh LoRA (B = 0, so the policy starts as the reference) or the adapter in `start` on the base's linear layers."""
        self.base = base
        anatomy = base.anatomy
        self.head = Head.of(anatomy)
        self.device: torch.device = base.device
        proved = is_proved(base.model)
        bare = None if proved and not base.fused else Bare.of(base)
        if start is None:
            # "all-linear" would also adapt what stands beside the decoder, and experts.
            targets = "all-linear" if proved else list(anatomy.linear_maps(base.model))
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # LoRA's A is drawn while the adapter is attached
                self.model: Any = get_peft_model(base.model, config, adapter_name=TRAINED)
        else:
            check_adapter(start, base.identity)
            with _fitting(start, base):
                self.model = PeftModel.from_pretrained(base.model, str(start), adapter_name=TRAINED, is_trainable=True)
        if base.fused:
            unsloth.fuse(self.model, base.device, checkpointing=checkpointing)
        self.model.peft_config[TRAINED].base_model_name_or_path = hub_name(base.name)
        without_dropout(self.model)
        self.parameters: dict[str, torch.nn.Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.loss_scale = LOSS_SCALE_FLOAT16 if base.compute_dtype == torch.float16 else 1.0
        self._role: str | None = None
        forward = TupleForward if base.fused else Forward
        self.forward = forward(anatomy, base.device, lambda: self._role or "", lambda: self._role in MOVING)
        if not base.fused:
            make_lean(self.model)
            if checkpointing or base.streamed:  # what is kept of a streamed layer is gone with it
                self.forward.recompute_layers()
                self.forward.offload = offload
        self.model.train()
        self._adapted: list[list[Any]] = [[module for module in layer.modules() if is_adapted(module)] for layer in anatomy.layers]
        if base.streamed:  # a recording would replay the copies of one token
            self.forward.steady = False
        self.layerwise = Layerwise(self.forward, self._turn, self._preparing) if base.streamed and goes(self.forward) else None
        self.notes: tuple[str, ...] = ()
        if bare is not None:
            with self.acting_as("reference"):
                self.notes = prove(base, bare, self.head, self.forward)
        if bare is not None and base.fused:
            with self.acting_as("policy"):
                read = self.forward.hidden_states(*bare.rows())
            prove_training(base, read, self.forward.hidden_states(*bare.rows()), self.parameters)

    @property
    def rank(self) -> int:
        """Rank of the trained LoRA; an adapter that was started from brings its own."""
        return int(self.model.peft_config[TRAINED].r)

    @property
    def alpha(self) -> float:
        """Scale of the trained LoRA, likewise."""
        return float(self.model.peft_config[TRAINED].lora_alpha)

    @property
    def size(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @contextmanager
    def acting_as(self, role: str, *, decoding: bool = False, folded: bool = False) -> Iterator[None]:
        """The model is `role` ("policy", "reference", "ema" or a loaded adapter) in evaluation mode without gradients.

        `decoding`: many small forwards follow, which a card has less work with then (`model.joined`). `folded` makes one matrix of base and
        adapter for the length of the block (`linear.folded`: float32 only).
        """
        assert self._role is None, f"already acting as {self._role}: role blocks don't nest"
        tuner = self.model.base_model
        joins = decoding and self.forward.steady
        self._role = role
        self.model.eval()
        try:
            if role == "reference":
                tuner.disable_adapter_layers()
            elif role != "policy":
                tuner.set_adapter(role)
            with torch.no_grad(), into_one(self.model) if folded else nullcontext(), self._joined() if joins else nullcontext():
                yield
        finally:
            if role == "reference":
                tuner.enable_adapter_layers()
            elif role != "policy":
                tuner.set_adapter(TRAINED)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.parameters)
            self.model.train()
            self._role = None

    def _joined(self) -> AbstractContextManager[None]:
        return joined(self.model, self.forward.decoder, self.base.compute_dtype)

    def read(self, batches: Sequence[Batch], ahead: Sequence[Batch] = ()) -> Iterator[Tensor]:
        """Each batch's hidden states [b, width, D] by its role, in order: without a gradient, or of the policy in training ("").

        A loss of states in training is to be backpropagated before the next are asked for, and the last before the end: where layers are
        streamed, all batches share one pass of the weights, and their backward pass comes last. `ahead` is what will be read next in training.
        """
        if self.layerwise is not None:
            yield from self.layerwise.read(batches, ahead)
            return
        for role, some in itertools.groupby(batches, key=lambda batch: batch.role):
            with self.acting_as(role) if role else nullcontext():
                for batch in some:
                    yield self.forward.hidden_states(batch.prompts, batch.responses, batch.width, batch.shared)

    @contextmanager
    def _turn(self, role: str, layer: int) -> Iterator[None]:
        """`role` in one layer only, for passes that go layer by layer; restored on exit."""
        names = [role] if role not in ("", "policy", "reference") else [TRAINED]
        for module in self._adapted[layer]:
            module._active_adapter, module._disable_adapters = names, role == "reference"
        try:
            with self._preparing(role):
                yield
        finally:
            for module in self._adapted[layer]:
                module._active_adapter, module._disable_adapters = [TRAINED], False

    @contextmanager
    def _preparing(self, role: str) -> Iterator[None]:
        """`role` for all that isn't a layer."""
        assert self._role is None, f"already acting as {self._role}: role blocks don't nest"
        self._role = role or None
        try:
            with torch.set_grad_enabled(role == ""):
                yield
        finally:
            self._role = None

    def scale_adapter(self, factor: float) -> None:
        """Multiplies the trained adapter's part by `factor` from now on: 1 is as trained, 0 the bare base."""
        for module in self.model.modules():
            if hasattr(module, "set_scale") and TRAINED in getattr(module, "scaling", {}):
                module.set_scale(TRAINED, factor)

    def add_ema(self) -> None:
        """Adds the slow average, equal to the policy now."""
        self._add("ema", self.model.peft_config[TRAINED], self.state())

    def update_ema(self, rate: float) -> None:
        """ema ← (1 − rate)·ema + rate·policy."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self._named[name.replace(f".{TRAINED}.", ".ema.")].lerp_(parameter, rate)

    def add_frozen(self, name: str, folder: Path) -> None:
        """Loads another adapter of this base for reading (`acting_as(name)`); AdapterError if it isn't one of this base."""
        check_adapter(folder, self.base.identity)
        with _fitting(folder, self.base):
            self.model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        self._pin()

    def state(self, name: str = TRAINED) -> dict[str, Tensor]:
        """An adapter's tensors under PEFT's file names, float32, on the host."""
        state: Mapping[str, Tensor] = get_peft_model_state_dict(self.model, adapter_name=name)
        return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}

    def load_state(self, state: Mapping[str, Tensor], name: str = TRAINED) -> None:
        """Puts an adapter's tensors back, to the bit."""
        set_peft_model_state_dict(self.model, dict(state), adapter_name=name)

    def save_adapter(self, folder: Path, name: str = TRAINED, *, step: int | None = None) -> None:
        """Writes adapter_config.json, adapter_model.safetensors, the base's identity with the `step` it is of, and how to load it without iqlite into an
        existing, private folder. The same adapter is the same bytes."""
        from safetensors.torch import save_file

        config = self.model.peft_config[name]
        as_it_is = config.inference_mode, config.target_modules
        config.inference_mode = True
        if isinstance(config.target_modules, set):  # whose order differs from process to process
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))
        config.inference_mode, config.target_modules = as_it_is
        save_file(self.state(name), folder / "adapter_model.safetensors", {"format": "pt"})  # of two keys the order would differ as well
        self.base.identity.write(folder, step)
        (folder / "README.md").write_text(
            LOADING.format(base=hub_name(self.base.name), loader=auto_class(self.base.model.config, self.base.name).__name__), "utf-8"
        )

    def _add(self, name: str, config: Any, state: Mapping[str, Tensor]) -> None:
        self.model.add_adapter(name, config)
        self.load_state(state, name)
        self._pin()

    def _pin(self) -> None:
        self._named = dict(self.model.named_parameters())
        for name, parameter in self._named.items():
            parameter.requires_grad_(name in self.parameters)


def without_dropout(model: Any) -> None:
    """Some bases (attention) and adapters drop units out while training: the policy that learns must be the one that answered."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


@contextmanager
def _fitting(folder: Path, base: Base) -> Iterator[None]:
    """Says which adapter it is that can't be read, or has other shapes than the base."""
    try:
        yield
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{folder} can't be read ({first_line(error)}): save the adapter again.") from None
    except RuntimeError as error:
        raise AdapterError(f"{folder} doesn't fit {base.name} ({first_line(error)}): use it with its own base.") from None
