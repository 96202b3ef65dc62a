"""Channels that can be scaled: by any positive factors, without any change of what a model computes.

Where all that makes a channel is multiplied by a factor and all that reads it is divided by it, nothing changes, if the
operators in between are positively homogeneous: f(s·x) = s·f(x) for s > 0. It is the freedom that cross-layer
equalisation and SmoothQuant use. Which channels that holds for follows from the exported graph, as coupled groups do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from trimpoint.errors import SurgeryError
from trimpoint.graph.atoms import Atoms, compact, first_of, spread
from trimpoint.graph.groups import grouped, named
from trimpoint.graph.operators import HANDLERS, name_of
from trimpoint.graph.propagate import NO_ATOMS, Parameter, Propagation, argument, shape_of
from trimpoint.graph.surgery import tensor_of
from trimpoint.graph.trace import Trace
from trimpoint.losses import call
from trimpoint.parts import Group, Member, Scalings
from trimpoint.signature import flatten

_HOMOGENEOUS = frozenset(
    [
        "relu",
        "leaky_relu",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "neg",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "to",
        "_to_copy",
        "lift_fresh_copy",
        "view",
        "reshape",
        "_unsafe_view",
        "movedim",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "repeat",
        "tile",
        "slice",
        "select",
        "narrow",
        "cat",
        "concat",
        "concatenate",
        "stack",
        "flip",
        "roll",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "native_channel_shuffle",
        "repeat_interleave",
        "t",
        "numpy_T",
        "mT",
        "transpose",
        "permute",
        "swapaxes",
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "unbind",
        "mean",
        "sum",
        "amax",
        "amin",
        "max",
        "min",
        "index_select",
        "gather",
        "index",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "max_pool2d_with_indices",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_trilinear3d",
        "upsample_bicubic2d",
        "linear",
        "addmm",
        "embedding",
        "_assert_tensor_metadata",
        "_assert_async",
        "_assert_scalar",
    ]
)
"""Operators that do to channels what they do to atoms in pruning; all others that are not below end them."""
_SEVERAL = "a parameter is used in several places"
_NORMALISED = "is normalised again"
_FIXED, _UNREAD = "reads values that cannot be scaled", "is read by no layer"
_TOLERANCE = 1e-3


@dataclass
class _Scaling(Propagation):
    """A propagation in which channels begin at each layer and each normalisation, and end at what reads them."""

    norms: dict[str, str] = field(default_factory=dict)

    def run(self) -> Atoms:
        for node in self.trace.program.graph.nodes:
            if node.op == "placeholder" and node.name in self.trace.owners and len(node.users) > 1:
                self.atoms.freeze_owner(self.trace.owners[node.name][0], _SEVERAL)
        return super().run()

    def _watch(self, node: Node) -> None:
        """Nothing has to stay rectangular."""

    def ids(self, node: Any) -> Tensor:
        found, parameter = super().ids(node), self.parameter(node)
        for (owner, _), entry in self.atoms.dimensions.items():
            if parameter is not None and owner == parameter.owner:
                entry.role = "out"  # a tensor that takes part as it is makes channels
        return found

    def _call(self, node: Node) -> Any:
        name = name_of(node.target)
        if name in _RULES:
            return _RULES[name](self, node)
        if name in _HOMOGENEOUS or not name:
            return super()._call(node)
        return self.unknown(node)


def _sum(p: _Scaling, node: Node) -> Any:
    """Add: what meets must be scaled alike."""
    inputs = [part for part in node.args[:2] if isinstance(part, Node) and shape_of(part) is not None]
    shape = shape_of(node) or ()
    if len(inputs) != 2 or any(isinstance(part, (int, float)) and part for part in node.args[:2]):
        return p.unknown(node)
    first, second = (_wide(p.ids(part), shape) for part in inputs)
    p.atoms.couple_strictly(first, second, "meets values that cannot be scaled")
    return spread(first_of(first, second), shape)


def _wide(ids: Tensor, shape: Sequence[int]) -> Tensor:
    return ids[(None,) * (len(shape) - ids.dim())].expand(tuple(shape))


def _times(p: _Scaling, node: Node) -> Any:
    """Multiply by a number, or divide by one."""
    source, other = node.args[:2]
    if isinstance(source, Node) and isinstance(other, (int, float)) and shape_of(source) is not None:
        return p.ids(source)
    return p.unknown(node)


def _products(p: _Scaling, node: Node) -> Any:
    """Multiply matrices: a layer, or values that are weighted with what is not scaled, as in attention."""
    left, right = cast(tuple[Node, Node], node.args[:2])
    if p.parameter(right) is not None or p.parameter(left) is not None:
        return HANDLERS["matmul"](p, node) if p.parameter(left) is None else p.unknown(node)
    weights, values = p.ids(left), p.ids(right)
    if bool((compact(weights) >= 0).any()) or values.dim() < 2:
        return p.unknown(node)
    p.atoms.require_constant(values, [-2], "summed over")
    shape = shape_of(node) or ()
    return spread(_wide(values.narrow(-2, 0, 1), (*shape[:-2], 1, shape[-1])), shape)


def _attention(p: _Scaling, node: Node) -> Any:
    """Weight values by attention: they can be scaled, queries and keys are left."""
    query, key, value = cast(tuple[Node, Node, Node], node.args[:3])
    for part in (query, key, argument(node, "attn_mask")):
        if part is not None:
            p.keep(part, "decides on attention")
    values, shape = p.ids(value), shape_of(node) or ()
    p.atoms.require_constant(values, [-2], "summed over")
    if values.shape[:-2] != torch.Size(shape[:-2]):
        return p.unknown(node)
    return spread(values.narrow(-2, 0, 1), shape)


def _convolution(p: _Scaling, node: Node) -> Any:
    weight, groups = p.parameter(node.args[1]), argument(node, "groups")
    if weight is None or groups == 1:
        return HANDLERS["conv2d"](p, node)
    ids = p.ids(node.args[0])
    channel = ids.dim() - len(weight.shape) + 1
    if "transpose" in name_of(node.target) or weight.shape[1] != 1 or weight.shape[0] != groups:
        p.keep(cast(Node, node.args[0]), "read by a convolution in groups")
        return p.none_of(node)
    # Each channel makes the one in its place; the same dimension of the weight reads, and makes.
    reads = p.atoms.dimension(weight.owner, -len(weight.shape), weight.shape[0], "in")
    p.atoms.consume(ids.movedim(channel, -1), reads, NO_ATOMS)
    makes = p.dimension(weight, 0, "out")
    _bias(p, argument(node, "bias"), makes)
    shape = shape_of(node) or ()
    return spread(makes.view([-1 if dim == channel else 1 for dim in range(len(shape))]), shape)


def _bias(p: _Scaling, bias: Any, makes: Tensor) -> None:
    parameter = p.parameter(bias) if bias is not None else None
    if parameter is not None:
        p.atoms.couple(makes, p.dimension(parameter, 0, "out"))
    elif bias is not None:
        p.atoms.freeze(makes, "its bias is computed, not a parameter")


def _norm(p: _Scaling, node: Node) -> Any:
    """Normalise: what comes in cannot be scaled, what goes out can, by the affine part."""
    source, name = cast(Node, node.args[0]), name_of(node.target)
    shape = shape_of(source) or ()
    p.keep(source, _NORMALISED)
    weight, bias = (
        p.parameter(part) if part is not None else None for part in (argument(node, "weight"), argument(node, "bias"))
    )
    if weight is None or len(weight.shape) != 1 or (argument(node, "bias") is not None and bias is None):
        return p.none_of(node)
    makes = p.dimension(weight, 0, "out")
    if bias is not None:
        p.atoms.couple(makes, p.dimension(bias, 0, "out"))
    channel = 1 if name in ("batch_norm", "instance_norm", "group_norm") else len(shape) - 1
    if name == "batch_norm" and (layer := _maker(p, source)) is not None:
        path, norm = layer.owner[0], weight.owner[0]
        p.norms[path] = norm
        own = p.atoms.dimension(layer.owner, -1 - len(layer.shape), weight.shape[0], "through")
        p.atoms.couple(makes, own)
    return spread(makes.view([-1 if dim == channel else 1 for dim in range(len(shape))]), shape)


def _maker(p: _Scaling, node: Node) -> Parameter | None:
    """Return the weight of the layer that makes `node`, if nothing else reads that."""
    name = name_of(node.target) if node.op == "call_function" else ""
    if len(node.users) != 1 or not (name == "linear" or name in ("conv1d", "conv2d", "conv3d")):
        return None
    return p.parameter(node.args[1])


_RULES: dict[str, Any] = {
    **dict.fromkeys(("add", "sub", "subtract", "add_", "sub_"), _sum),
    **dict.fromkeys(("mul", "multiply", "div", "divide"), _times),
    **dict.fromkeys(("matmul", "mm", "bmm"), _products),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), _convolution),
    **dict.fromkeys(("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"), _norm),
}


def find_scalings(trace: Trace, prefix: str = "") -> Scalings:
    """Return which channels of a model can be scaled.

    Args:
        trace: of the model.
        prefix: of the paths in the result.

    References:
        Nagel, van Baalen, Blankevoort and Welling, "Data-free quantization through weight equalization and bias
        correction" (2019), section 4.1.
    """
    propagation = _Scaling(trace)
    atoms = propagation.run()
    classes, reasons = atoms.solve()
    groups = [_placed(group, prefix) for group in grouped(atoms, classes, reasons, {})[0]]
    norms = {prefix + path: prefix + norm for path, norm in propagation.norms.items()}
    return Scalings(groups=named(groups), norms=norms)


def _placed(group: Group, prefix: str) -> Group:
    """Return the group with the dimensions that its tensors have (the other keys stand for the first)."""
    members = (replace(m, path=(prefix + m.path).rstrip("."), dim=max(0, m.dim)) for m in group.members)
    roles, reason = {member.role for member in group.members}, group.reason.replace(NO_ATOMS, _FIXED)
    if not {"out", "in"} <= roles:
        reason = reason or (_FIXED if "in" in roles else _UNREAD)
    return replace(group, members=tuple(members), reason=reason)


@torch.no_grad()
def rescale_(module: nn.Module, factors: Mapping[Group, Tensor], inputs: Any) -> set[str]:
    """Scale channels of a model, in place: all that makes them by a factor, all that reads them by its inverse.

    Args:
        module: the model.
        factors: group → positive factors `[size]`.
        inputs: on which it must answer as before, see `trimpoint.losses.call`.

    Returns:
        the paths of modules whose tensors have other values now.

    Raises:
        SurgeryError: if it does not; it is then as it was.
    """
    touched = {
        (member.path, member.parameter): tensor_of(module, member.path, member.parameter)
        for group in factors
        for member in group.members
    }
    before, saved = _answers(module, inputs), {key: tensor.clone() for key, tensor in touched.items()}
    for group, sizes in factors.items():
        for member in group.members:
            if member.role != "through":
                tensor = touched[member.path, member.parameter]
                tensor.copy_(_scaled(tensor, member, sizes))
    after = _answers(module, inputs)
    off = max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(after, before, strict=True))
    if not off <= _TOLERANCE:
        for key, tensor in touched.items():
            tensor.copy_(saved[key])
        raise SurgeryError(f"The model answers otherwise when its channels are scaled, by {off:.2g} of its outputs.")
    return {path for (path, name), tensor in touched.items() if not torch.equal(tensor, saved[path, name])}


def _scaled(tensor: Tensor, member: Member, factors: Tensor) -> Tensor:
    result = tensor.double()
    sizes = torch.ones(tensor.shape[member.dim], dtype=torch.float64, device=tensor.device)
    for unit, positions in enumerate(member.indices):
        sizes[list(positions)] = factors[unit].double().to(sizes)
    shape = [-1 if dim == member.dim else 1 for dim in range(tensor.ndim)]
    return (result * sizes.view(shape) if member.role == "out" else result / sizes.view(shape)).to(tensor.dtype)


def _answers(module: nn.Module, inputs: Any) -> list[Tensor]:
    return [
        leaf.double() for leaf in flatten(call(module, inputs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
