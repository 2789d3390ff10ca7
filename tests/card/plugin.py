"""python -m pytest -p tests.card.plugin …: the whole session on a played card. PLAYED_CARD and PLAYED_GIB name it."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

from tests.card.driver import played

STACK = ExitStack()
STACK.enter_context(played(os.environ.get("PLAYED_CARD", "RTX 4090"), float(os.environ.get("PLAYED_GIB", "24"))))


def pytest_unconfigure(config: pytest.Config) -> None:
    STACK.close()
