"""`iqlite doctor` here, and where something is missing: every line is ok or says what to type, and the exit code is for scripts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest

from iqlite.machine import checks
from iqlite.machine.checks import CHECKS, made


def asked(iqlite: Callable[..., tuple[int, str, str]]) -> tuple[int, dict[str, dict[str, Any]]]:
    code, out, _ = iqlite("doctor", "--json")
    found = json.loads(out)
    assert found["ok"] == (code == 0) and list(found["checks"][0]) == ["name", "state", "found", "fix"]
    return code, {check["name"]: check for check in found["checks"]}


def test_here(iqlite: Callable[..., tuple[int, str, str]]) -> None:
    code, found = asked(iqlite)
    assert set(found) == set(CHECKS)
    assert found["NF4"]["state"] == found["libraries"]["state"] == "ok"
    assert all(check["fix"] for check in found.values() if check["state"] == "wrong")
    again, out, _ = iqlite("doctor")
    assert again == code and ("everything that iqlite needs is here" in out) == (code == 0)


def test_without_bitsandbytes_and_disk(iqlite: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, found = asked(iqlite)
    assert code == 1 and found["NF4"]["state"] == found["disk"]["state"] == "wrong"
    assert "bitsandbytes" in found["NF4"]["found"] and "pip install --force-reinstall bitsandbytes" in found["NF4"]["found"]
    assert "free some space" in found["disk"]["fix"]


def test_a_torch_that_cannot_reach_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a driver answers and torch, here built for CPUs or for a newer CUDA than the driver knows, finds no card."""
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(checks, "card_here", lambda: ("NVIDIA GeForce RTX 4070", 8.0 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for build, fix in ((None, "install the CUDA build"), ("13.0", "update the card's driver")):
        monkeypatch.setattr(torch.version, "cuda", build)
        found = made("torch", CHECKS["torch"])
        assert found.state == "wrong" and "it can't reach NVIDIA GeForce RTX 4070" in found.found and fix in found.fix
    assert made("card", CHECKS["card"]).state == "wrong"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert made("torch", CHECKS["torch"]).state == "missing"


def test_a_check_that_fails_is_a_finding() -> None:
    def broken() -> checks.Check:
        raise OSError("libcudart.so: cannot open shared object file")

    found = made("torch", broken)
    assert found.state == "wrong" and "libcudart.so" in found.found and found.fix
