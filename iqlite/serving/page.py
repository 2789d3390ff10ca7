"""The page at `/`: one file without anything from elsewhere, and the headers that hold it to that."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from importlib.resources import files

from iqlite.terminal import harmless

NAME = "{{ name }}"


def page(name: str) -> str:
    """The page of a server that serves `name`."""
    return (files("iqlite.serving") / "page.html").read_text("utf-8").replace(NAME, html.escape(harmless(name)))


def headers(text: str) -> dict[str, str]:
    """Nothing runs or is shown but what stands in the page itself, which asks nobody but its own server."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in found)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
