"""A GPU that is pretended on the CPU: real numbers, but every tensor remembers where it would be.

`with Pretended() as gpu:` lets tensors say `device="cuda"`, so that the code takes the branches it takes on a GPU, and
refuses what CUDA would refuse: operands on two devices, NumPy on a GPU's tensor, a generator of the CPU for it, a forked
process. `gpu.syncs` counts what would make the CPU wait for the GPU, by the place that asked. With `wide=False` it has no
float64, as an Apple GPU has none.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU, CPU = "cuda", "cpu"
ROOT = Path(__file__).parents[1]
FACTORIES = {
    *(torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones, torch.rand),
    *(torch.randint, torch.randn, torch.randperm, torch.sparse_coo_tensor, torch.sparse_csr_tensor, torch.tensor),
    *(torch.as_tensor, torch.zeros, torch.from_numpy, torch.scalar_tensor, torch.asarray, torch.empty_strided),
}
HERE = {"numpy", "tolist", "__array__", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero"}
HERE |= {"_local_scalar_dense", "masked_select", "equal", "is_nonzero", "allclose"}
INDEXED = {
    "__getitem__",
    "__setitem__",
    "index",
    "index_put_",
    "index_put",
}  # a CPU's index into a GPU's tensor is allowed
MOVES = {"copy_", "__set__", "_has_compatible_shallow_copy_type"}
PROPERTIES = {"device", "is_cuda", "is_cpu"}


class Mixed(RuntimeError):
    """What CUDA would answer."""


def tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors(value)
        elif isinstance(value, dict):
            found += tensors(value.values())
    return found


def place(tensor: Tensor) -> str | None:
    """Return where a tensor would be; None where nobody said, as for gradients that autograd made."""
    return getattr(tensor, "_place", None)


def kind(device: Any) -> str | None:
    return None if device is None else str(device).partition(":")[0]


class Pretended(TorchFunctionMode):
    def __init__(self, *, wide: bool = True) -> None:
        super().__init__()
        self.wide, self.pid = wide, os.getpid()
        self.syncs: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        given = tensors([args, kwargs])
        if name == "__get__" and owner in PROPERTIES:
            return self._property(owner, args[0], func)
        wanted = kind(kwargs.get("device"))
        if name in ("to", "cuda", "cpu"):
            return self._moved(func, name, args, kwargs)
        if wanted == GPU:
            kwargs["device"] = CPU
            if kwargs.get("generator") is not None:
                raise Mixed(f"{name}: a generator of the CPU was given for a tensor on {GPU}")
        self._check(name, args, given)
        result = func(*args, **kwargs)
        if func in FACTORIES:
            source = (
                given[0]
                if name in ("as_tensor", "asarray", "sparse_coo_tensor", "sparse_csr_tensor") and given
                else None
            )
            where = wanted or (place(source) if source is not None else CPU)
        else:
            where = wanted or self._of(name, args, given)
        if name == "__set__" and owner == "data":
            args[0]._place = place(args[1])
        if where is not None:
            for each in tensors([result]):
                if place(each) is None or each not in given_ids(given):
                    self._put(each, where)
        return result

    def _property(self, owner: str, tensor: Tensor, func: Any) -> Any:
        gpu = place(tensor) == GPU
        return {"device": torch.device(GPU, 0) if gpu else func(tensor), "is_cuda": gpu, "is_cpu": not gpu}[owner]

    def _moved(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        tensor, *rest = args
        wanted = {"cuda": GPU, "cpu": CPU}.get(name) or kind(kwargs.pop("device", None))
        kept = []
        for value in rest if name == "to" else ():
            if isinstance(value, torch.device | str):
                wanted = kind(value)
            elif isinstance(value, Tensor):
                wanted = place(value)
                kept.append(value.dtype)
            elif isinstance(value, torch.dtype):
                kept.append(value)
        if wanted == CPU and place(tensor) == GPU:
            self._sync(name)
        kwargs.pop("non_blocking", None)
        result = tensor.clone() if wanted not in (None, place(tensor)) else tensor
        if kept or kwargs:
            result = func(result, *kept, **kwargs)
        self._put(result, wanted or place(tensor))
        return result

    def _put(self, tensor: Tensor, where: str | None) -> None:
        if where == GPU and tensor.dtype == torch.float64 and not self.wide:
            raise Mixed("a tensor of float64 on a GPU that has none")
        tensor._place = where  # pyright: ignore[reportAttributeAccessIssue]

    def _check(self, name: str, args: Any, given: list[Tensor]) -> None:
        gpu = [each for each in given if place(each) == GPU]
        if not gpu:
            return
        if os.getpid() != self.pid:
            raise Mixed("CUDA cannot be used in a forked process")
        if name in HERE and place(given[0]) == GPU:
            if name in ("numpy", "__array__"):
                raise Mixed("can't convert a cuda tensor to numpy; use .cpu() first")
            self._sync(name)
        if name in INDEXED:
            masks = [each for each in given[1:] if each.dtype == torch.bool]
            if masks and place(given[0]) == GPU and name == "__getitem__":
                self._sync("index by a mask")
            if place(given[0]) == CPU:
                raise Mixed(f"{name}: an index on {GPU} into a tensor on {CPU}")
            return
        if name in MOVES:
            return
        here = [each for each in given if place(each) == CPU and each.dim() > 0]
        if here:
            shapes = [tuple(each.shape) for each in (*gpu, *here)]
            raise Mixed(f"{name}: tensors on {GPU} and {CPU}, of shapes {shapes}")

    def _of(self, name: str, args: Any, given: list[Tensor]) -> str | None:
        if name == "copy_" and given:
            return place(given[0])
        places = {place(each) for each in given if each.dim() > 0} or {place(each) for each in given}
        return GPU if GPU in places else CPU if places == {CPU} else None  # beside what nobody knows of, neither

    def _sync(self, what: str) -> None:
        frame: Any = sys._getframe(2)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT / "sae_italian") or "sae_lens" in file.parts:
                where = f"{file.name}:{frame.f_code.co_name}"
                self.syncs[f"{where}: {what}"] += 1
                return
            frame = frame.f_back
        self.syncs[f"elsewhere: {what}"] += 1


def given_ids(given: list[Tensor]) -> Any:
    """Return the identities of tensors as something that `in` asks by identity."""

    class Ids:
        def __contains__(self, tensor: object) -> bool:
            return any(tensor is each for each in given)

    return Ids()
