"""What a CUDA graph does, on a CPU: a step's operations with their tensors, recorded once and repeated on the same memory without its Python."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Recording(TorchDispatchMode):
    """Of what is done within it. Unlike a graph's, its recording is a run too: `rewind` puts back what that wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert function not in WAITS, f"{function} waits for the host"
        if function._schema.is_mutable:
            for argument, value in zip(function._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._note(_plain(value))
        results = function(*args, **kwargs)
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        fresh = [tensor for tensor in _tensors(results) if _storage(tensor) not in given]
        self.made |= {_storage(tensor) for tensor in fresh}
        self.calls.append((function, args, kwargs, fresh))
        return results

    def _note(self, value: torch.Tensor) -> None:
        if _storage(value) in self.made | self.before.keys():
            return
        whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
        self.before[_storage(value)] = (whole, whole.clone())

    def rewind(self) -> None:
        """What was there before is there again."""
        for tensor, value in self.before.values():
            tensor.copy_(value)

    def replay(self) -> None:
        """The operations again, each into the memory it wrote when it was recorded."""
        for function, args, kwargs, fresh in self.calls:
            results = function(*args, **kwargs)
            if fresh:
                for tensor, value in zip(fresh, _tensors(results), strict=True):
                    tensor.copy_(value)


def _plain(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = vars(tensor).get("inner", tensor)  # a played card's
    return found


def _storage(tensor: Any) -> int:
    return int(_plain(tensor).untyped_storage()._cdata)


def _tensors(tree: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
