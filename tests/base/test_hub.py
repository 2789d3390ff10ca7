"""Without a network the hub is given up at once, the local cache still serves, and local work never asks."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from iqlite.base.hub import offline_without_network
from iqlite.errors import BaseError
from iqlite.recipe.schema import Recipe
from iqlite.training.opening import open_session


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A machine without a network; the addresses that were tried."""
    tried: list[tuple[str, int]] = []

    def unreachable(address: tuple[str, int], *_: Any) -> socket.socket:
        tried.append(address)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tried


def test_an_unreachable_hub_is_tried_once(asked: list[tuple[str, int]]) -> None:
    for _ in range(2):
        offline_without_network()
    assert constants.HF_HUB_OFFLINE and len(asked) == 1


def test_a_hub_model_without_network_is_one_sentence_after_one_try(
    asked: list[tuple[str, int]], make_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(BaseError, match="isn't in the local cache and the hub can't be reached: connect to the network"):
        open_session(make_recipe(model={"base": "allenai/OLMo-2-1124-7B-SFT"}))
    assert len(asked) == 1


def test_local_work_never_asks(asked: list[tuple[str, int]], make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    open_session(make_recipe())
    assert asked == [] and not constants.HF_HUB_OFFLINE
