"""What a CUDA graph does, on a CPU: a step's operations with their tensors, recorded once and repeated on the same memory without its Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Of what `step` does. Unlike a graph's, its recording is a run too, so the step's tensors are put back afterwards."""

    def __init__(self, step: Callable[[], None]):
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.made: set[int] = set()
        with self:
            step()
        for tensor, value in self.before.values():
            tensor.copy_(value)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), (
            f"{function} waits for the host"
        )
        if function._schema.is_mutable:
            for argument, value in zip(function._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    storage = value.untyped_storage()._cdata
                    if storage not in self.made and storage not in self.before:
                        whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
                        self.before[storage] = (whole, whole.clone())
        results = function(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        fresh = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in given]
        self.made |= {tensor.untyped_storage()._cdata for tensor in fresh}
        self.calls.append((function, args, kwargs, fresh))
        return results

    def replay(self) -> None:
        """The operations again, each into the memory it wrote when it was recorded."""
        for function, args, kwargs, fresh in self.calls:
            results = function(*args, **kwargs)
            if fresh:
                outputs = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
                assert len(outputs) == len(fresh)
                for tensor, value in zip(fresh, outputs, strict=True):
                    tensor.copy_(value)
