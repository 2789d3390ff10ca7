"""unsloth, a backend of its own: a base loaded through it, with its forwards in place of transformers' and its kernels under the adapter.

It changes transformers, PEFT and TRL for the whole process, so only a training run asks for it, in a process that trains and nothing else.
Its statistics are off, and what it writes goes into iqlite's cache and not into the working folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iqlite.errors import BaseError, first_line
from iqlite.places import cache_folder

FAST = ("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3")
"""Model types that it has forwards of its own for; all others it hands to transformers' code, compiled, which iqlite has nothing to gain from."""
FIX = 'set model.backend = "plain"'


def installed() -> bool:
    """True where it can be imported; doesn't import it."""
    return importlib.util.find_spec("unsloth") is not None


def prepare(asked: str, kind: str, *, card: bool) -> str:
    """The backend that `asked` (model.backend) comes to for a model of type `kind`: "plain" or "unsloth", which is then imported.

    Called before transformers and PEFT are imported, which it wants to change first. BaseError if it was asked for and can't be had.
    """
    if asked == "plain" or (asked == "auto" and not (card and kind in FAST and installed())):
        return "plain"
    if not installed():
        raise BaseError(
            f'model.backend = "unsloth": unsloth isn\'t installed; install it into an environment of its own (docs/unsloth.md), or {FIX}.'
        )
    if kind not in FAST:
        raise BaseError(f'model.backend = "unsloth": it has no fast path for a {kind!r} model, only for {", ".join(FAST)}: {FIX}.')
    with _quiet():
        try:
            import unsloth  # noqa: F401
        except (ImportError, RuntimeError, NotImplementedError, AttributeError, OSError) as error:
            raise BaseError(f'model.backend = "unsloth": it can\'t be imported ({first_line(error)}): mend it, or {FIX}.') from None
    return "unsloth"


def is_fused() -> bool:
    """True where its own forwards and kernels are used; on a machine without a card it is transformers and PEFT as they are."""
    import unsloth

    return bool(unsloth.DEVICE_TYPE != "cpu")


def load(source: str, revision: str | None, quantization: str, dtype: Any, device: Any, context: int) -> tuple[Any, set[str]]:
    """(model, names of weights that its files lack) of the folder or hub id `source`. Raises what transformers raises."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = source
    if not Path(source).is_dir():  # by its name it might take another file of the same model, quantised by others
        folder = snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
    from unsloth import FastLanguageModel

    with _quiet():
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=context,
            dtype=dtype,
            load_in_4bit=quantization == "nf4",
            local_files_only=True,
            use_exact_model_name=True,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": device.index} if device.type == "cuda" else "cpu",
            use_gradient_checkpointing=_mode(device, True),
        )
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # a base stored in 4 bits brings its own
            module.compute_dtype = dtype
    stored: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored |= set(opened.keys())
    return model, {name for name, _ in model.named_parameters()} - stored  # a tied head has no name of its own


def fuse(model: Any, device: Any, *, checkpointing: bool) -> None:
    """Its kernels and its checkpointing, which keeps layers' inputs in the computer's memory, for a PEFT model on a base it has loaded."""
    from unsloth import FastLanguageModel

    with _quiet():
        FastLanguageModel.patch_peft_model(model, _mode(device, checkpointing))
    # In training it drops masks, since its own trainers pad on the right.
    model.get_base_model().get_decoder()._unsloth_keep_padding_mask = True


def _mode(device: Any, checkpointing: bool) -> Any:
    return ("unsloth" if device.type == "cuda" else True) if checkpointing else False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its banners (standard output may be a program's), statistics, warnings of what was imported first, or files in the working folder."""
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
