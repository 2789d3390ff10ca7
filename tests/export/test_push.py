"""`iqlite push` against a stand-in of the hub, by huggingface_hub itself: what arrives, loaded with PEFT, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants

from iqlite.run.rundir import RunDir
from tests.helpers.hub import TOKEN, Hub, standing_in
from tests.whole.test_json import check

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with standing_in() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)  # what HF_ENDPOINT sets when the package is imported
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in takes large files by LFS only
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


def test_a_pushed_adapter_is_the_run_s(hub: Hub, iqlite: Call, make_run: Callable[..., RunDir], tmp_path: Path) -> None:
    run = make_run()
    code, out, err = iqlite("push", run.path, "me/kind", "--json")
    assert code == 0, err
    said = json.loads(out)
    check("iqlite push RUN", said)
    repo = hub.repos["me/kind"]
    assert (
        repo["private"]
        and said["new"]
        and said["private"]
        and said["base_model"] is None
        and said["url"] == f"{hub.url}/me/kind/commit/{hub.sha('me/kind')}"
    )
    assert not re.search(re.escape(str(tmp_path)).encode(), b"".join(repo["files"].values()))  # no path of this machine
    for name, data in repo["files"].items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(data)
    card = ModelCard.load(tmp_path / "got" / "README.md")
    assert card.data.base_model is None and "iqlite" in card.data.tags and "iqlite-manifest.json" in repo["files"]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = run.recipe().model.base
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "got")("hello").input_ids])
    pushed, own = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder) for folder in (tmp_path / "got", run.adapter)
    )
    with torch.no_grad():
        assert torch.equal(pushed(ids).logits, own(ids).logits)
        assert not torch.equal(own(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits)
    assert iqlite("push", run.path, "me/kind", "--public")[0] == 0  # again, onto what is ours; it stays private
    assert repo["commits"] == 3 and repo["private"]
    made = {key: value for key, value in run.environment().items() if key not in ("run", "place", "format")}
    other = RunDir.create(tmp_path / "other", run.recipe(), made | {"base": made["base"] | {"name": "org/base"}})

    def copied(path: Path) -> None:
        shutil.copytree(run.adapter, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))

    other.save_folder(other.adapter, copied)
    hub.make("org/base")
    code, _, err = iqlite("push", other.path, "me/open", "--public")
    assert code == 0, err
    assert not hub.repos["me/open"]["private"]
    assert 'base_model: "org/base"' in hub.repos["me/open"]["files"]["README.md"].decode()
    assert json.loads(hub.repos["me/open"]["files"]["adapter_config.json"])["base_model_name_or_path"] == "org/base"


def test_what_is_others_stays(hub: Hub, iqlite: Call, make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    hub.make("me/other", README_md=b"mine")
    code, _, err = iqlite("push", run.path, "me/other")
    assert code == 2 and "holds files that iqlite didn't push (README.md)" in err and hub.repos["me/other"]["commits"] == 1
    assert iqlite("push", run.path, "me/other", "--force")[0] == 0 and hub.repos["me/other"]["commits"] == 2


@pytest.mark.parametrize(
    "repo, token, message",
    [
        ("kind", TOKEN, "give OWNER/NAME"),
        ("me/a b", TOKEN, "isn't a name that the hub takes"),
        ("others/kind", TOKEN, "may the token write there"),
        ("me/kind", "hf_wrong", "may the token write there"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(hub: Hub, iqlite: Call, make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch, repo: str, token: str, message: str) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, err = iqlite("push", make_run().path, repo)
    assert code == 2 and message in err and err.count("\n") == 1 and not hub.repos


def test_somebody_pushes_meanwhile(hub: Hub, iqlite: Call, make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    from iqlite.export import folder

    hub.make("me/kind", private=True)
    opened = folder.opened

    def slowly(*given: Any, **more: Any) -> Any:
        hub.repos["me/kind"]["commits"] += 1
        return opened(*given, **more)

    monkeypatch.setattr(folder, "opened", slowly)
    code, _, err = iqlite("push", make_run().path, "me/kind")
    assert code == 2 and "changed by somebody else meanwhile" in err


def test_without_a_token_or_a_network(iqlite: Call, make_run: Callable[..., RunDir], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = iqlite("push", run.path, "me/kind")
    assert code == 2 and "can't be reached" in err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, _, err = iqlite("push", run.path, "me/kind")
    assert code == 2 and "needs a token" in err
