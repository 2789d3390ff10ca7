"""iqlite: describe a behaviour in words and train it into the weights, on the GPU you already own (Inverse-Q*, arXiv 2408.14874).

From Python: `load_recipe`, `train`, `open_run`; see docs/python.md. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from iqlite.errors import IqliteError

if TYPE_CHECKING:
    from iqlite.api import Run, TokenReward, load_recipe, open_run, train

__version__ = "0.1.0"
__all__ = ["IqliteError", "Run", "TokenReward", "__version__", "load_recipe", "open_run", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'iqlite' has no attribute {name!r}")
    from iqlite import api

    return getattr(api, name)
