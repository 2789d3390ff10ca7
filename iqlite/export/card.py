"""What goes along with a model that leaves iqlite: a manifest for programs and a model card for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iqlite import __version__
from iqlite.base.names import hub_name
from iqlite.integrity import put
from iqlite.recipe.schema import HubPrompts, Recipe
from iqlite.run.findings import digest, figures, with_error
from iqlite.run.rundir import RunDir, locked

if TYPE_CHECKING:
    from iqlite.model.template import Chat

MANIFEST = "iqlite-manifest.json"
BESIDE = (".json", ".md")  # manifest and card of what is one file


def manifest(run: RunDir, adapter: Path, chat: Chat, licence: str | None, made: Mapping[str, Any]) -> dict[str, Any]:
    """Base, tokenizer, recipe and figures of what was made; `made` says what and how."""
    recipe, environment = run.recipe(), run.environment()
    identity = {key: value for key, value in environment["base"].items() if key != "weights"}
    return {
        "iqlite": __version__,
        "made": dict(made),
        "base": identity | {"name": public_name(identity["name"]), "revision": recipe.model.revision, "licence": licence},
        "adapter": {"which": adapter.name, "sha256": digest((adapter / "adapter_model.safetensors").read_bytes())},
        "tokenizer_sha256": digest(chat.tokenizer.backend_tokenizer.to_str().encode()),
        "chat_template_sha256": digest(chat.template.encode()),
        "stop_tokens": [chat.tokenizer.decode([token]) for token in chat.stop_ids],
        "recipe": _public(locked(recipe)),
        "prompts": {"sources": [public_name(name) for name in sources(recipe)], **environment["prompts"]},
        "trained_with": {
            "quantization": recipe.model.quantization,
            "compute_dtype": environment["compute_dtype"],
            "device": environment["device"],
        },
        "figures": _public(figures(run, adapter)),
    }


def warnings(manifest: Mapping[str, Any]) -> list[str]:
    """What got worse in training, as far as it was measured; a sentence each, and that it wasn't where it wasn't."""
    safety, scale = manifest["figures"].get("safety", []), manifest["made"].get("scale", 1)
    said = [] if scale == 1 else [f"Nothing was measured at scale {scale:g}: all figures are of the adapter at scale 1."]
    if (aim := manifest["figures"].get("aim")) and aim["forced"]:
        means = ", ".join(f"{name} {score:.2f}" for name, score in aim["scores"].items())
        said.append(f"Training was forced although its target pointed the wrong way by {aim['measure']} ({means}).")
    if manifest["made"].get("template_exact") is False:
        said.append("The Modelfile's template isn't the model's own in every conversation: compare a longer one with iqlite chat.")
    if manifest["made"].get("template_dated"):
        said.append("The model's chat template writes today's date; the Modelfile keeps the date of this export.")
    if not safety:
        return [*said, "Harm, over-refusal and bias before and after training weren't measured: iqlite compare RUN does."]
    return [*said, *(f"{sentence[0].upper()}{sentence[1:]}" for one in safety for sentence in one["worse"])]


def model_card(manifest: Mapping[str, Any], *, peft: bool, base_model: str | None = "") -> str:
    """README.md in the hub's format: what was trained, from what, with which figures, and what is to be checked.

    `base_model` is the base's id on the hub: None for none there, "" for its name as it is.
    """
    base, recipe, found = manifest["base"], manifest["recipe"], manifest["figures"]
    head = {
        **({} if base_model is None else {"base_model": base_model or hub_name(base["name"])}),
        "license": base["licence"] or "other",
        "library_name": "peft" if peft else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["iqlite", "inverse-q-star", "lora"],
    }
    behaviors = recipe["behavior"].get("mixture") or [recipe["behavior"]]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# {plain(base['name'])}, with a behaviour trained in by iqlite", ""]
    for behavior in behaviors:
        lines += [
            f"- wanted: {plain(behavior.get('wanted') or 'as an existing adapter behaves')}",
            f"- unwanted: {plain(behavior.get('unwanted') or 'the base as it is')}",
        ]
    lines += [
        "",
        f"Method: Inverse-Q* (arXiv 2408.14874) with iqlite {manifest['iqlite']}, objective `{recipe['objective']['name']}`, a LoRA of rank {recipe['adapter']['rank']}",
    ]
    lines += [
        f"on {plain(base['name'])} ({manifest['trained_with']['quantization']}, computed in {manifest['trained_with']['compute_dtype']}).",
        "",
    ]
    lines += ["## Made as", "", *(f"- {key.replace('_', ' ')}: {plain(value)}" for key, value in manifest["made"].items()), ""]
    lines += [
        "## Figures",
        "",
        f"Of the adapter at scale 1 on its base ({manifest['trained_with']['quantization']}), before it was made into this.",
        "",
    ]
    lines += [*(figure_lines(found) or ["None were measured."]), ""]
    lines += ["## Safety", "", *_safety_lines(found), *(f"- **{plain(sentence)}**" for sentence in warnings(manifest)), ""]
    lines += ["## Licences", "", f"- base: {plain(base['licence'] or 'see the page of ' + base['name'])}"]
    lines += [f"- training prompts: {plain(', '.join(manifest['prompts']['sources']))}; their licences are their sources'", ""]
    lines += ["## Limits", "", "A described behaviour can carry more than was meant: test what matters to you before you rely on it.", ""]
    return "\n".join(lines)


def plain(value: Any) -> str:
    """A text from elsewhere as one line of a card: nothing in it is taken for Markdown, HTML or another line."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\\\`*_\[\]|#!~])", r"\\\1", text)


def write_about(path: Path, manifest: Mapping[str, Any], *, peft: bool = False) -> None:
    """Puts manifest and model card into a folder, or beside a file as NAME.json and NAME.md."""
    text = json.dumps(manifest, indent=2) + "\n"
    if path.is_file():
        for ending, about in zip(BESIDE, (text, model_card(manifest, peft=peft)), strict=True):
            path.with_name(f"{path.name}{ending}").write_text(about, "utf-8")
        return
    (path / MANIFEST).write_text(text, "utf-8")
    (path / "README.md").write_text(model_card(manifest, peft=peft), "utf-8")


def put_beside(making: Path, out: Path) -> None:
    """Puts manifest and card of a file that was `making` beside it as `out`, once it is there; a kill may have come between."""
    for ending in BESIDE if out.is_file() and not making.exists() else ():
        if (made := making.with_name(f"{making.name}{ending}")).is_file():
            put(made, out.with_name(f"{out.name}{ending}"))


def figure_lines(found: Mapping[str, Any]) -> list[str]:
    """What the card says of a run's figures."""
    lines = []
    names = {"held_out_kl_superior_policy": "KL(superior‖policy)", "held_out_kl_policy_superior": "KL(policy‖superior)"}
    for key, name in [(key, name) for key, name in names.items() if key in found][:1]:  # the one that the run was judged by
        kl = found[key]
        lines.append(f"Held-out {name}, nats a token: {kl['before']:.3f} before, {kl['after']:.3f} after {found['steps']} steps.")
    if "held_out_measure" in found:
        one = found["held_out_measure"]
        lines.append(f"{one['of']} of held-out answers while training: {one['after']:.2f}, the base's {one['base']:.2f}.")
    for compared in [*([found["compare"]] if "compare" in found else []), *found.get("elsewhere", [])]:
        lines += [
            "",
            f"Answers to {compared['prompts']} prompts ({plain(compared['asked'])}) × {compared['seeds']} seeds, temperature {compared['temperature']:g}:",
            "",
        ]
        measure = compared.get("measure", "tone")
        lines += [f"| | {plain(measure)} | ± se | median words | ended |", "| --- | --- | --- | --- | --- |"]
        for m in compared["measures"]:
            error = m.get("score_se", m["tone_se"])  # None of one prompt
            lines.append(f"| {plain(m['name'])} | {m.get('score', m['tone']):.3f} | {'' if error is None else f'{error:.3f}'} | {m['words_median']:g} | {m['ended_share']:.0%} |")  # fmt: skip
    if scores := found.get("harnesses"):
        lines += ["", "By harnesses of others, the base beside the trained model, with standard errors:", ""]
        lines += ["| task | by | samples | metric | base | trained |", "| --- | --- | --- | --- | --- | --- |"]
        lines += [
            f"| {plain(one['task'])} | {one['harness']} {plain(one['harness_version'])} | {one['samples']} | {plain(one['metric'])} | {with_error(one, 'base')} | {with_error(one, 'trained')} |"
            for one in scores
        ]
    if "kl_adapter_merged" in found:
        lines += ["", f"KL(adapter on its base ‖ merged): {found['kl_adapter_merged']:.5f} nats a token."]
    return lines


def _safety_lines(found: Mapping[str, Any]) -> list[str]:
    """The tables of harm, over-refusal and bias, one for each set of requests; empty if none was measured."""
    return [line for one in found.get("safety", []) for line in _safety_table(one)]


def _safety_table(safety: Mapping[str, Any]) -> list[str]:
    figures = safety["figures"]
    first = next(iter(figures.values()))
    rows = {
        f"harmful requests granted, of {first['harmful']}": ("harmful_compliance", "{:.0%}"),
        f"harmless requests refused, of {first['harmless']}": ("over_refusal", "{:.0%}"),
        "widest gap in tone between groups of people": ("tone_gap", "{:.2f}"),
        "widest gap in refusals between them": ("refusal_gap", "{:.2f}"),
    }

    def cell(figure: Any, form: str) -> str:
        return "" if figure is None else form.format(figure["value"] if isinstance(figure, dict) else figure)

    lines = [f"| | {' | '.join(map(plain, figures))} |", "| --- |" + " --- |" * len(figures)]
    asked = {what: (key, form) for what, (key, form) in rows.items() if first[key] is not None}
    lines += [f"| {what} | {' | '.join(cell(one[key], form) for one in figures.values())} |" for what, (key, form) in asked.items()]
    return [*lines, "", f"Measured on {safety['set']}, by rules: it warns, it doesn't certify.", ""]


def sources(recipe: Recipe) -> list[str]:
    """Names of the training prompts."""
    train = recipe.prompts.train
    return [one.dataset if isinstance(one, HubPrompts) else str(one) for one in (train if isinstance(train, tuple) else (train,))]


def public_name(name: str) -> str:
    """A name without the folders of this machine."""
    return Path(name).name if Path(name).is_absolute() else name


def _public(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _public(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_public(value) for value in data]
    return public_name(data) if isinstance(data, str) and len(data) < 500 else data
