"""A run's adapter as a folder that PEFT reads, with the base's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from iqlite.base.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS, IDENTITY_FILE, read_config

if TYPE_CHECKING:
    from iqlite.model.template import Chat


def write_peft(making: Path, adapter: Path, chat: Chat, *, scale: float = 1.0, base_model: str | None = None) -> None:
    """Fills a folder that is there with an adapter, at a scale; `base_model` is the name that its base goes by elsewhere, in place of a path here."""
    shutil.copyfile(adapter / ADAPTER_WEIGHTS, making / ADAPTER_WEIGHTS)
    config = read_config(adapter)
    config["lora_alpha"] *= scale
    if base_model:
        config["base_model_name_or_path"] = base_model
    if (adapter / IDENTITY_FILE).is_file():
        identity = json.loads((adapter / IDENTITY_FILE).read_text("utf-8"))
        if base_model:
            identity["base"]["name"] = base_model
        (making / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n", "utf-8")
    (making / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    chat.tokenizer.save_pretrained(making)
