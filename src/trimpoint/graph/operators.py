"""What each ATen operator does to atoms. Operators that are missing here keep what flows into them, with a reason."""

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from trimpoint.graph.atoms import compact, spread, varies
from trimpoint.graph.attention import ATTENTION, matrices
from trimpoint.graph.propagate import NO_ATOMS, Handler, Parameter, Propagation, argument, shape_of
from trimpoint.graph.recurrent import RECURRENT

HANDLERS: dict[str, Handler] = {**RECURRENT, **ATTENTION}
_COMPUTED = "selected by computed positions"
_PARTNER = "can only go with others that no removable channel makes"

_POINTWISE = frozenset({"hardswish", "hardsigmoid", "copy", "where", "multiply", "divide", "true_divide", "subtract"})
_PASS = """
    dropout feature_dropout alpha_dropout to _to_copy clone contiguous detach alias lift_fresh_copy lift_fresh
    zeros_like ones_like full_like empty_like rand_like randn_like fill tril triu float half bfloat16 type_as
"""
_STRUCTURAL = """
    view reshape _unsafe_view movedim flatten unflatten squeeze unsqueeze expand repeat tile slice select narrow
    cat concat concatenate stack flip roll pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    repeat_interleave
"""
_REDUCTIONS = """
    mean sum amax amin max min var std var_mean norm linalg_vector_norm logsumexp prod any all argmax argmin
"""
_SPATIAL = re.compile(r"(adaptive_)?(max|avg)_pool[123]d(_with_indices)?|lp_pool[123]d|_?upsample_\w+")


def name_of(target: Any) -> str:
    """Return the plain name of an ATen operator, in-place or not; `""` for anything else."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    name = target._schema.name.removeprefix("aten::")
    return name if name.endswith("__") else name.removesuffix("_")


def rule_of(target: Any) -> Handler | None:
    """Return what handles an operator, or `None` if it is not known."""
    name = name_of(target)
    if name in HANDLERS:
        return HANDLERS[name]
    if _SPATIAL.fullmatch(name):
        return _spatial
    if name and (name in _POINTWISE or torch.Tag.pointwise in target.tags):
        return _pointwise
    return None


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def _shape(node: Node) -> tuple[int, ...]:
    return shape_of(node) or ()


# Shapes


def _pointwise(p: Propagation, node: Node) -> Any:
    if shape_of(node) is None:
        return p.unknown(node)
    inputs = [part for part in node.all_input_nodes if shape_of(part) is not None]
    return p.elementwise(node, inputs)


@_handles(*_PASS.split())
def _pass(p: Propagation, node: Node) -> Any:
    source = cast(Node, node.args[0])
    return p.values[source] if _shape(source) == _shape(node) else p.unknown(node)


@_handles("expand_as")
def _expand_as(p: Propagation, node: Node) -> Any:
    return spread(p.ids(node.args[0]).expand(_shape(node)), _shape(node))


@_handles("t", "numpy_T", "mT", "transpose", "permute", "swapaxes")
def _transposed(p: Propagation, node: Node) -> Any:
    parameter = p.parameter(node.args[0])
    if parameter is None:
        return _structural(p, node)
    sizes = torch.empty(tuple(range(len(parameter.shape))))  # whose sizes are the numbers of its dimensions
    order = cast(Any, node.target)(sizes, *node.args[1:], **node.kwargs)
    moved = [int(size) for size in order.shape]
    return Parameter(parameter.owner, *(tuple(part[d] for d in moved) for part in (parameter.shape, parameter.dims)))


@_handles(*_STRUCTURAL.split())
def _structural(p: Propagation, node: Node) -> Any:
    """Do to the ids what is done to the values."""

    def ids(part: Any) -> Any:
        return p.ids(part).detach() if shape_of(part) is not None else part

    args = torch.fx.node.map_arg(node.args, ids)
    kwargs = torch.fx.node.map_arg(node.kwargs, ids)
    # Id tensors have strides of their own, so what is a view of the values may need a copy of the ids.
    views = name_of(node.target) in ("view", "_unsafe_view")
    result = cast(Any, torch.ops.aten.reshape.default if views else node.target)(*args, **kwargs)
    return spread(result, result.shape)


@_handles("split", "split_with_sizes", "chunk", "tensor_split", "unbind")
def _split(p: Propagation, node: Node) -> Any:
    """Split ids; parts of equal size stay equal, so what stands at the same place of each goes together."""
    source = p.ids(node.args[0])
    parts = cast(Any, node.target)(source.detach(), *node.args[1:], **node.kwargs)
    dim = argument(node, "dim", 0) % source.dim()
    if varies(source, dim) and len({part.shape for part in parts}) == 1:
        for part in parts[1:]:
            p.atoms.couple_strictly(parts[0], part, _PARTNER)
    return tuple(spread(part, part.shape) for part in parts)


@_handles("glu")
def _glu(p: Propagation, node: Node) -> Any:
    first, second = p.ids(node.args[0]).chunk(2, argument(node, "dim"))
    p.atoms.couple_strictly(first, second, _PARTNER)
    return spread(first, _shape(node))


@_handles("pad", "constant_pad_nd")
def _pad(p: Propagation, node: Node) -> Any:
    """Pad: along dimensions without channels the border belongs to the channel; along channels it belongs to none."""
    ids, amounts = p.ids(node.args[0]), list(argument(node, "pad"))
    constant = argument(node, "mode", "constant") == "constant"
    for index in range(0, len(amounts), 2):
        dim = ids.dim() - 1 - index // 2
        before, after = amounts[index : index + 2]
        if before == after == 0:
            continue
        if varies(ids, dim) and constant:
            ids = F.pad(ids, [0, 0] * (index // 2) + [before, after], value=-1)
        else:
            p.atoms.require_constant(ids, [dim], "padded by copies of other channels")
            sizes = list(ids.shape)
            sizes[dim] += before + after
            ids = ids.narrow(dim, 0, 1).expand(sizes)
    return spread(ids, _shape(node))


def _spatial(p: Propagation, node: Node) -> Any:
    """Pooling and interpolation work on each channel by itself: the last one, two or three dimensions are theirs."""
    ids = p.ids(node.args[0])
    count = int(match.group(1)) if (match := re.search(r"([123])d", name_of(node.target))) else ids.dim() - 2
    spatial = range(ids.dim() - count, ids.dim())
    _alike_along(p, ids, list(spatial), f"read by {node.target} across channels")
    for dim in spatial:
        ids = ids.narrow(dim, 0, 1)
    empty = p.none_of(node)
    if isinstance(empty, tuple):
        return (ids.expand(empty[0].shape), *empty[1:])
    return ids.expand(empty.shape)


@_handles(*_REDUCTIONS.split())
def _reduction(p: Propagation, node: Node) -> Any:
    if len([part for part in node.all_input_nodes if shape_of(part) is not None]) > 1:
        return _pointwise(p, node)  # max and min of two tensors
    if node not in p.live or not p.ids(node.args[0]).numel():
        return p.none_of(node)
    ids = p.ids(node.args[0])
    dims = argument(node, "dim")
    dims = list(range(ids.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = sorted(dim % ids.dim() for dim in dims) if ids.dim() else []
    p.atoms.require_constant(ids, dims, f"the operator {node.target} takes one value over these channels")
    rest = [dim for dim in range(ids.dim()) if dim not in dims]
    lost = any(varies(ids, dim) for dim in dims) and not any(varies(ids, dim) for dim in rest)
    keepdim = bool(argument(node, "keepdim", False))
    for dim in reversed(dims):
        ids = ids.narrow(dim, 0, 1) if keepdim else ids.select(dim, 0)
    empty = p.none_of(node)
    if lost:
        return empty
    return (ids, *empty[1:]) if isinstance(empty, tuple) else ids


@_handles("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "_safe_softmax")
def _along(p: Propagation, node: Node) -> Any:
    ids = p.ids(node.args[0])
    p.atoms.require_constant(ids, [argument(node, "dim")], f"the operator {node.target} runs over these channels")
    return ids


@_handles("index_select")
def _index_select(p: Propagation, node: Node) -> Any:
    dim = argument(node, "dim")
    ids = _table(p, node.args[0], [dim])
    p.atoms.require_constant(ids, [dim], _COMPUTED)
    return spread(ids.narrow(dim, 0, 1), _shape(node))


@_handles("gather")
def _gather(p: Propagation, node: Node) -> Any:
    ids, shape = p.ids(node.args[0]), _shape(node)
    dim = argument(node, "dim") % max(ids.dim(), 1)
    if any(ids.shape[d] != size and varies(ids, d) for d, size in enumerate(shape) if d != dim):
        return p.unknown(node)
    p.atoms.require_constant(ids, [dim], _COMPUTED)
    return spread(compact(ids.narrow(dim, 0, 1)), shape)


def _alike_along(p: Propagation, ids: Tensor, dims: list[int], reason: str) -> None:
    """Keep what differs along `dims`; rows of a table of parameters are read as a whole, column by column."""
    rest = any(varies(ids, dim) for dim in range(ids.dim()) if dim not in dims)
    if rest and any(varies(ids, dim) for dim in dims) and p.atoms.are_elements(ids):
        first = ids
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        p.atoms.couple(ids, first)
    p.atoms.require_constant(ids, dims, reason)


def _table(p: Propagation, source: Any, rows: list[int]) -> Tensor:
    """Return the ids of what is read by its rows; a parameter with one other dimension is a table of channels."""
    parameter = p.parameter(source)
    rest = [dim for dim in range(len(parameter.shape)) if dim not in rows] if parameter else []
    if parameter is None or len(rest) != 1:
        return p.ids(source)
    own = p.dimension(parameter, rest[0], "through")
    return spread(own.view([-1 if dim == rest[0] else 1 for dim in range(len(parameter.shape))]), parameter.shape)


@_handles("index")
def _index(p: Propagation, node: Node) -> Any:
    """Index by tensors along dimensions in which ids do not vary: any position will do."""
    indices = cast(list[Node | None], node.args[1])
    ids = _table(p, node.args[0], [d for d, i in enumerate(indices) if i is not None])
    if any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices):
        return p.unknown(node)
    _alike_along(p, ids, [d for d, i in enumerate(indices) if i is not None], _COMPUTED)
    zeros = [None if i is None else torch.zeros(_shape(i), dtype=torch.long) for i in indices]
    return spread(cast(Any, torch.ops.aten.index.Tensor)(ids, zeros), _shape(node))


@_handles("_assert_tensor_metadata", "_assert_async", "_assert_scalar")
def _nothing(p: Propagation, node: Node) -> Any:  # noqa: ARG001
    return None


# Products


@_handles("linear")
def _linear(p: Propagation, node: Node) -> Any:
    weight = p.parameter(node.args[1])
    if weight is None or len(weight.shape) != 2:
        return p.unknown(node, p.computed(node.args[1], "linear layer"))
    return _product(p, node, cast(Node, node.args[0]), weight, 1, 0, argument(node, "bias"))


@_handles("addmm")
def _addmm(p: Propagation, node: Node) -> Any:
    bias, left, right = cast(tuple[Node, Node, Node], node.args)
    weight = p.parameter(right)
    if weight is None or p.parameter(left):
        return p.unknown(node)
    return _product(p, node, left, weight, 0, 1, bias)


def _product(
    p: Propagation, node: Node, source: Node, weight: Parameter, in_dim: int, out_dim: int, bias: Any
) -> Tensor:
    """Read channels along the last dimension of `source`, make those of the weight's `out_dim`."""
    ids = p.ids(source)
    reads, makes = p.dimension(weight, in_dim, "in"), p.dimension(weight, out_dim, "out")
    if not varies(ids, -1) and ids.numel() > 1 and any(varies(ids, dim) for dim in range(ids.dim() - 1)):
        # Mixes positions (tokens) within each channel: the channels pass, the positions stay.
        p.atoms.freeze(torch.cat([reads, makes]), "mixes positions, not channels")
        return spread(ids.narrow(-1, 0, 1), _shape(node))
    p.atoms.consume(ids, reads, NO_ATOMS)
    _bias(p, bias, makes, "out")
    return spread(makes, _shape(node))


def _bias(p: Propagation, bias: Any, makes: Tensor, role: str) -> None:
    if bias is None:
        return
    parameter = p.parameter(bias)
    if parameter is None or len(parameter.shape) != 1:
        p.atoms.freeze(makes, "the bias of its layer is computed, not a parameter")
        return
    p.atoms.couple(makes, p.dimension(parameter, 0, role))


@_handles("matmul", "mm", "bmm")
def _matmul(p: Propagation, node: Node) -> Any:
    left, right = cast(tuple[Node, Node], node.args[:2])
    weight = p.parameter(right)
    if weight is not None and len(weight.shape) == 2 and p.parameter(left) is None:
        return _product(p, node, left, weight, 0, 1, None)
    return matrices(p, node, left, right)


@_handles("embedding")
def _embedding(p: Propagation, node: Node) -> Any:
    weight = p.parameter(node.args[0])
    if weight is None or len(weight.shape) != 2:
        return p.unknown(node)
    return spread(p.dimension(weight, 1, "out"), _shape(node))


# Convolutions


@_handles(*(f"conv{'_transpose' * t}{n}d" for t in (0, 1) for n in (1, 2, 3)))
def _convolution(p: Propagation, node: Node) -> Any:
    weight = p.parameter(node.args[1])
    if weight is None:
        return p.unknown(node, p.computed(node.args[1], "convolution"))
    ids, groups = p.ids(node.args[0]), argument(node, "groups")
    channel = ids.dim() - len(weight.shape) + 1
    ids = ids.movedim(channel, 0).flatten(1) if ids.dim() > 1 else ids.unsqueeze(1)
    transposed = "transpose" in name_of(node.target)
    inputs = ids.shape[0]
    if groups == inputs > 1 and (transposed or weight.shape[1] == 1):
        makes = _depthwise(p, ids, weight, groups, transposed)
        _bias(p, argument(node, "bias"), makes, "through")
    else:
        makes = _grouped(p, ids, weight, groups, transposed)
        _bias(p, argument(node, "bias"), makes, "out")
    shape = _shape(node)
    return spread(makes.view([-1 if d == channel else 1 for d in range(len(shape))]), shape)


def _depthwise(p: Propagation, ids: Tensor, weight: Parameter, groups: int, transposed: bool) -> Tensor:
    """Each input channel makes its own outputs, and goes with them."""
    own = p.dimension(weight, 0, "through")
    if transposed:
        p.atoms.consume(ids, own.unsqueeze(1), NO_ATOMS)
        return own.repeat_interleave(weight.shape[1])
    multiplier = weight.shape[0] // groups
    p.atoms.consume(ids.unsqueeze(1), own.view(groups, multiplier, 1), NO_ATOMS)
    p.atoms.couple(own.view(groups, multiplier), own.view(groups, multiplier)[:, :1])
    return own


def _grouped(p: Propagation, ids: Tensor, weight: Parameter, groups: int, transposed: bool) -> Tensor:
    """Each group must stay as wide as the others: what stands at the same place of each goes together."""
    if transposed:
        reads, makes = p.dimension(weight, 0, "in"), p.dimension(weight, 1, "out").repeat(groups)
        p.atoms.consume(ids, reads.unsqueeze(1), NO_ATOMS)
        p.atoms.couple(reads.view(groups, -1), reads.view(groups, -1)[:1])
        return makes
    reads, makes = p.dimension(weight, 1, "in"), p.dimension(weight, 0, "out")
    p.atoms.consume(ids.reshape(groups, -1, ids.shape[1]), reads.unsqueeze(1), NO_ATOMS)
    p.atoms.couple(makes.view(groups, -1), makes.view(groups, -1)[:1])
    return makes


# Normalisation


@_handles("batch_norm", "instance_norm", "prelu")
def _affine(p: Propagation, node: Node) -> Any:
    """Couple the channels, along dimension 1, with parameters that have one number for each."""
    parameters = [part for part in node.all_input_nodes[1:] if p.parameter(part)]
    ids = p.ids(node.args[0])
    if len(parameters) != len(node.all_input_nodes) - 1:
        return p.unknown(node)
    for part in parameters:
        parameter = cast(Parameter, p.parameter(part))
        if len(parameter.shape) == 1 and parameter.shape[0] == ids.shape[1] > 1:
            p.atoms.consume(ids.movedim(1, -1), p.dimension(parameter, 0, "through"), NO_ATOMS)
    return ids


@_handles("group_norm")
def _group_norm(p: Propagation, node: Node) -> Any:
    """A normalisation group can only go as a whole: its statistics are taken over its channels."""
    ids, groups = p.ids(node.args[0]), cast(int, node.args[1])
    grouped = ids.movedim(1, 0).flatten(1)
    parts = grouped.reshape(groups, -1, grouped.shape[1])
    p.atoms.couple_strictly(parts, parts[:, :1], _PARTNER)
    return _affine(p, node)


@_handles("layer_norm", "rms_norm")
def _layer_norm(p: Propagation, node: Node) -> Any:
    ids, shape = p.ids(node.args[0]), cast(list[int], node.args[1])
    reason = f"{name_of(node.target)} in `{p.trace.modules[node.name]}` takes its statistics over these channels"
    p.atoms.require_constant(ids, range(-len(shape), 0), reason)
    for part in node.all_input_nodes[1:]:
        own = p.ids(part)
        if p.apart([ids, own])[1] is own:
            p.atoms.consume(ids, own, NO_ATOMS)
    return ids
