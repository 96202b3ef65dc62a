"""Residual blocks: modules that can be left out because their input is already a guess of their output."""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from trimpoint.errors import SurgeryError
from trimpoint.graph.bypass import returned_structure, tensors_in
from trimpoint.graph.operators import name_of
from trimpoint.graph.trace import trace
from trimpoint.losses import call, explained
from trimpoint.parts import Block

# A stack holds at least this share of its parameters in blocks that are alike; half is enough for the trunk, which
# holds at least half of the model's parameters.
_STACK_SHARE, _TRUNK_SHARE = 0.9, 0.5
_ACTIVATIONS = (
    "relu relu6 hardtanh clamp leaky_relu prelu elu selu celu gelu silu mish hardswish tanh sigmoid softplus "
    "dropout feature_dropout alpha_dropout contiguous clone alias detach to _to_copy view reshape"
)
_NORMS = "batch_norm instance_norm layer_norm group_norm rms_norm"
_PASSED = frozenset(f"{_ACTIVATIONS} {_NORMS}".split())


@cache
def _mark() -> Any:
    """Return an operator that copies a tensor and carries a name into the traced graph."""

    @torch.library.custom_op("trimpoint::mark", mutates_args=(), schema="(Tensor value, str name) -> Tensor")
    def mark(value: Tensor, name: str) -> Tensor:  # noqa: ARG001
        return value.clone()

    @mark.register_fake
    def _(value: Tensor, name: str) -> Tensor:  # noqa: ARG001
        return torch.empty_like(value)

    return mark


@dataclass
class _Calls:
    """What one run tells of a module: how often it was called, and its shape if it could be bypassed."""

    count: int = 0
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Candidate:
    path: str
    module: nn.Module
    shape: tuple[int, ...]
    inner: "list[_Candidate]" = field(default_factory=list)

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def kind(self) -> tuple[Any, ...]:
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in self.module.named_parameters())
        return (type(self.module).__qualname__, shapes)


def find_blocks(module: nn.Module, inputs: Any) -> tuple[Block, ...]:
    """Return the blocks of a model that can be bypassed, in the order of its modules.

    A block owns parameters, is called exactly once, returns a main tensor (its first) of the shape of its first tensor
    input, and adds that input to its output: in the traced graph a path leads from one to the other through additions,
    normalisations, activations and dropout alone. Of nested ones the outermost counts, unless it is a stack of several
    blocks that are alike.

    Args:
        module: the model; it is not changed.
        inputs: one batch, as for `trimpoint.task.call`.

    Raises:
        TraceError: if the model cannot be traced.
    """
    candidates = _candidates(module, inputs)
    if not candidates:
        return ()
    residual = _residual(module, inputs, {candidate.path for candidate in candidates})
    total = sum(parameter.numel() for parameter in module.parameters())
    roots = _nested([candidate for candidate in candidates if candidate.path in residual])
    return tuple(_block(candidate) for root in roots for candidate in _outermost(root, total))


def _candidates(module: nn.Module, inputs: Any) -> list[_Candidate]:
    """Run the model once and return the modules that return no more than their inputs, in shape."""
    copied = copy.deepcopy(module).eval()
    calls: dict[str, _Calls] = defaultdict(_Calls)

    def record(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[path].count += 1
            try:
                returned_structure(path, args, kwargs, output)
            except SurgeryError:
                calls[path].shape = None
            else:
                calls[path].shape = tuple(next(tensors_in(output)).shape)

        return hook

    parts = {
        path: part
        for path, part in copied.named_modules()
        if path and next(part.children(), None) is not None and next(part.parameters(), None) is not None
    }
    for path, part in parts.items():
        part.register_forward_hook(record(path), with_kwargs=True)
    with torch.no_grad(), explained(inputs):
        call(copied, inputs)
    found = []
    for path in parts:
        shape = calls[path].shape
        if calls[path].count == 1 and shape is not None:
            found.append(_Candidate(path, module.get_submodule(path), shape))
    return found


def _residual(module: nn.Module, inputs: Any, paths: set[str]) -> set[str]:
    """Return the paths of the modules that add their first input to their output."""
    marked = copy.deepcopy(module)
    for path in paths:
        part = marked.get_submodule(path)
        part.register_forward_pre_hook(_mark_input(f"{path}:in"), with_kwargs=True)
        part.register_forward_hook(_mark_output(f"{path}:out"))
    marks: dict[str, Node] = {}
    for node in trace(marked, inputs).program.graph.nodes:
        if _is_mark(node):
            marks[cast(str, node.args[1])] = node
    return {
        path
        for path in paths
        if f"{path}:in" in marks and f"{path}:out" in marks and _connected(marks[f"{path}:in"], marks[f"{path}:out"])
    }


def _is_mark(node: Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("trimpoint.mark")


def _mark_input(name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        for index, value in enumerate(args):
            if isinstance(value, Tensor):
                return (*args[:index], _mark()(value, name), *args[index + 1 :]), kwargs
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, {**kwargs, key: _mark()(value, name)}
        return args, kwargs

    return hook


def _mark_output(name: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _mark()(output, name)
        if type(output) in (tuple, list):
            index = next((i for i, value in enumerate(output) if isinstance(value, Tensor)), None)
            if index is not None:
                return type(output)([*output[:index], _mark()(output[index], name), *output[index + 1 :]])
        if isinstance(output, Mapping):
            key = next((k for k, value in output.items() if isinstance(value, Tensor)), None)
            if key is not None:
                output[key] = _mark()(output[key], name)  # type: ignore[index]
        return output

    return hook


def _connected(start: Node, end: Node) -> bool:
    """Return whether a path of identities and at least one addition leads from `start` to `end`."""
    todo, seen = [(end, False)], set()
    while todo:
        node, added = todo.pop()
        if node is start and added:
            return True
        if (node, added) in seen:
            continue
        seen.add((node, added))
        todo += [(source, added or adds) for source, adds in _sources(node)]
    return False


def _sources(node: Node) -> list[tuple[Node, bool]]:
    """Return the inputs that `node` passes on, and whether it adds something computed to them."""
    if node.op != "call_function":
        return []
    name = name_of(node.target)
    if _is_mark(node) or name in _PASSED:
        return [(node.args[0], False)] if isinstance(node.args[0], Node) else []
    computed = [part for part in node.all_input_nodes if part.op != "placeholder" or _is_input(part)]
    first, second = (*node.args, None)[:2]
    if name in ("add", "sub"):
        # What is subtracted comes out with the other sign, so it is no guess of the output.
        positive = [first] if name == "sub" or cast(float, node.kwargs.get("alpha", 1)) <= 0 else [first, second]
        return [(part, len(computed) > 1) for part in computed if part in positive]
    if name in ("mul", "div") and len(computed) == 1 and _keeps_sign(first, second, name):
        return [(computed[0], False)]
    return []


def _keeps_sign(first: Any, second: Any, name: str) -> bool:
    """Return whether a product or quotient is one of its two operands, scaled; a learned scale is taken as positive."""
    if isinstance(first, Node) and isinstance(second, Node):
        return first is not second and (name == "mul" or _is_input(first) or first.op != "placeholder")
    factor = second if isinstance(first, Node) else first
    return isinstance(factor, (int, float)) and factor > 0 and (name == "mul" or factor is second)


def _is_input(node: Node) -> bool:
    return not node.name.startswith(("p_", "b_", "c_"))


def _nested(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Return the outermost candidates, each holding those inside it."""
    roots: list[_Candidate] = []
    stack: list[_Candidate] = []
    for candidate in candidates:
        while stack and not candidate.path.startswith(stack[-1].path + "."):
            stack.pop()
        (stack[-1].inner if stack else roots).append(candidate)
        stack.append(candidate)
    return roots


def _outermost(candidate: _Candidate, total: int) -> list[_Candidate]:
    inner = candidate.inner
    wrapper = len(inner) == 1 and inner[0].params == candidate.params
    if _is_stack(candidate, total) or wrapper:
        return [found for part in inner for found in _outermost(part, total)]
    return [candidate]


def _is_stack(candidate: _Candidate, total: int) -> bool:
    """Return whether nearly all of a module is made of blocks that are alike, or of stacks of them."""
    inner = candidate.inner
    if isinstance(candidate.module, nn.Sequential) and len(inner) > 1:
        return True
    kinds = [part.kind for part in inner]
    blocks = sum(part.params for part in inner if kinds.count(part.kind) > 1 or _is_stack(part, total))
    share = _TRUNK_SHARE if candidate.params >= _TRUNK_SHARE * total else _STACK_SHARE
    return blocks >= share * candidate.params


def _block(candidate: _Candidate) -> Block:
    parent = candidate.path.rpartition(".")[0]
    sizes = "×".join(map(str, candidate.shape[1:]))
    family = f"{type(candidate.module).__name__} {sizes}" + (f" in {parent}" if parent else "")
    return Block(path=candidate.path, shape=candidate.shape, params=candidate.params, family=family)
