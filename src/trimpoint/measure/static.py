"""What can be counted without a clock: parameters, and multiply–accumulate operations of one sample."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from trimpoint.data import as_tensors
from trimpoint.errors import DataError
from trimpoint.losses import call, explained
from trimpoint.signature import flatten, structure_of, unflatten

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class ParamCount:
    """Numbers of parameters.

    Args:
        total: every tensor once, however often it is tied or shared.
        by_module: path of the module that owns parameters → how many; what is tied counts where it is met first.
    """

    total: int
    by_module: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MacCount:
    """Multiply–accumulate operations of one forward pass of one sample.

    Args:
        total: of the operators that are counted.
        by_module: path of the innermost module that called the operator → its share; sums to `total`.
        by_operator: ATen operator → its share; sums to `total`.
        not_counted: ATen operator → number of calls, for everything that computes but has no products to accumulate,
            or none that are known here. What only moves or reshapes data is left out.
    """

    total: int
    by_module: dict[str, int] = field(default_factory=dict)
    by_operator: dict[str, int] = field(default_factory=dict)
    not_counted: dict[str, int] = field(default_factory=dict)


def count_params(module: nn.Module) -> ParamCount:
    """Count the parameters of a module, tied and shared ones once.

    Example:
        >>> count_params(nn.Linear(3, 2)).total
        8
    """
    seen: set[int] = set()
    by_module: dict[str, int] = {}
    for path, part in module.named_modules():
        own = [p for p in part.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        if own:
            by_module[path] = sum(parameter.numel() for parameter in own)
    return ParamCount(total=sum(by_module.values()), by_module=by_module)


def count_macs(module: nn.Module, inputs: Any) -> MacCount:
    """Count the multiply–accumulate operations of one sample by running it once in evaluation mode.

    Counted are matrix products, convolutions, scaled dot-product attention and recurrent layers, as ATen executes
    them. Masked and padded positions count like all others.

    Args:
        module: on the CPU; left as it was.
        inputs: a batch, in the structure that the module takes; its first sample is used.

    Raises:
        DataError: if the inputs hold no tensor with a batch dimension.
        ModelError: if the module does not run on them.
    """
    sample = _first_sample(inputs)
    counter = _Counter({id(part): path for path, part in reversed(list(module.named_modules()))})
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), evaluating(module), counter.watching(), counter, explained(sample, "an example"):
            call(module, sample)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return MacCount(
        total=sum(counter.by_module.values()),
        by_module=dict(counter.by_module),
        by_operator=dict(counter.by_operator),
        not_counted=dict(sorted(counter.not_counted.items())),
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and every part of it back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _first_sample(inputs: Any) -> Any:
    tensors = as_tensors(inputs)
    leaves = flatten(tensors)
    batched = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not batched:
        raise DataError("Inputs must hold a tensor with a batch dimension. Got none.")
    first = [leaf[:1] if isinstance(leaf, Tensor) and leaf.shape[:1] == (batched[0],) else leaf for leaf in leaves]
    return unflatten(structure_of(tensors), first)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every ATen operator and charges it to the module that is running."""

    def __init__(self, paths: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paths = paths
        self.stack = [""]
        self.by_module: Counter[str] = Counter()
        self.by_operator: Counter[str] = Counter()
        self.not_counted: Counter[str] = Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow which module runs, by hooks that are global and leave the model alone."""

        def enter(part: nn.Module, _: Any) -> None:
            self.stack.append(self.paths.get(id(part), self.stack[-1]))

        def leave(_part: nn.Module, _inputs: Any, _output: Any) -> None:
            self.stack.pop()

        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        formula = _FORMULAS.get(packet)
        if formula is None and func is not aten._local_scalar_dense.default:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        result = func(*args, **kwargs)
        name = packet.__name__
        if formula is not None:
            macs = formula(args, kwargs, result)
            self.by_module[self.stack[-1]] += macs
            self.by_operator[name] += macs
        elif not (func.is_view or packet in _MOVES or name.startswith(("new_", "empty", "sym_", "is_"))):
            self.not_counted[name] += 1
        return result


def _product(args: Any, _kwargs: Any, result: Tensor) -> int:
    """Each output element of a matrix product accumulates over the inner dimension of its left factor."""
    return result.numel() * int(args[0].shape[-1])


def _added_product(args: Any, _kwargs: Any, result: Tensor) -> int:
    return result.numel() * int(args[1].shape[-1])


def _added_batched_product(args: Any, _kwargs: Any, _result: Tensor) -> int:
    return int(args[1].numel()) * int(args[2].shape[-1])


def _convolution(args: Any, _kwargs: Any, result: Tensor) -> int:
    """Every weight meets each output position once; in a transposed convolution, each input position."""
    inputs, weight, transposed = args[0], args[1], bool(args[6])
    positions = (inputs if transposed else result).shape[2:]
    return int(result.shape[0] * math.prod(positions) * weight.numel())


def _attention(args: Any, _kwargs: Any, _result: Any) -> int:
    """Queries × keys, then weights × values: `[batch, heads, length, size]` each."""
    query, key, value = args[:3]
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return int(pairs * (query.shape[-1] + value.shape[-1]))


def _recurrent_layer(args: Any, _kwargs: Any, _result: Any) -> int:
    """One direction of one layer (oneDNN): both weight matrices, once for each step of each sequence."""
    inputs, weight_input, weight_hidden = args[:3]
    steps = inputs.shape[0] * inputs.shape[1]
    return int(steps * (weight_input.numel() + weight_hidden.numel()))


_FORMULAS: dict[Any, Callable[[Any, Any, Any], int]] = {
    aten.mm: _product,
    aten.bmm: _product,
    aten.mv: _product,
    aten.dot: lambda args, _kwargs, _result: int(args[0].numel()),
    aten.addmm: _added_product,
    aten.addmv: _added_product,
    aten.baddbmm: _added_product,
    aten.addbmm: _added_batched_product,
    aten._addmm_activation: _added_product,
    aten.convolution: _convolution,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten.mkldnn_rnn_layer: _recurrent_layer,
}

_MOVES = {
    aten.cat,
    aten.stack,
    aten.clone,
    aten.copy_,
    aten._to_copy,
    aten.constant_pad_nd,
    aten.index_select,
    aten.index,
    aten.gather,
    aten.embedding,
    aten.roll,
    aten.flip,
    aten.repeat,
    aten._reshape_copy,
    aten._unsafe_view,
    aten.lift_fresh,
    aten.full,
    aten.full_like,
    aten.zeros,
    aten.zeros_like,
    aten.ones,
    aten.ones_like,
    aten.arange,
    aten.scalar_tensor,
    aten.fill_,
    aten.zero_,
    aten._local_scalar_dense,
}
