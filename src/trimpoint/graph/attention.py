"""What products of two tensors do to atoms, attention above all: where heads meet, they go whole.

A head is recognised by what is done with it, not by the names of classes: a product that contracts channels which
differ along a batch dimension too is one product for each position of that dimension. All channels of one position can
only go together.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from trimpoint.graph.atoms import compact, first_of, spread, varies
from trimpoint.graph.propagate import SHARED, Handler, Propagation, argument, shape_of

_LONE = "multiplied with values of a fixed size"
_MEETS = "meets other channels in a product"
_WEIGHT = "a parameter is multiplied from the left, or in batches"


def product(
    p: Propagation,
    operands: Sequence[Tensor],
    labels: Sequence[Sequence[str]],
    made: Sequence[str],
    shape: Sequence[int],
) -> Tensor:
    """Couple what meets in a product of two tensors that is summed over some dimensions; return the result's ids.

    Args:
        p: to be told.
        operands: ids of the two tensors.
        labels: names of their dimensions, as in an Einstein sum.
        made: those of the result; dimensions that are not among them are summed over.
        shape: of the result.
    """
    shared = set(labels[0]) & set(labels[1])
    every = [*made, *dict.fromkeys(name for names in labels for name in names if name not in made)]
    batch = [dim for dim, name in enumerate(every) if name in shared and name in made]
    inner = [dim for dim, name in enumerate(every) if name not in made]
    both = [dim for dim in inner if every[dim] in shared]
    a, b = (_aligned(ids, names, every) for ids, names in zip(operands, labels, strict=True))
    for ids in (a, b):
        p.atoms.require_constant(ids, [dim for dim in inner if dim not in both], "summed over")
    sums = [any(varies(ids, dim) for dim in both) for ids in (a, b)]
    heads = [any(varies(ids, dim) for dim in batch) for ids in (a, b)]
    reduced = []
    for ids, summed, headed in zip((a, b), sums, heads, strict=True):
        small = _narrowed(ids, inner)
        if summed and headed:
            p.atoms.couple(ids, small, heads=True)
            p.atoms.mark(torch.unique(small[small >= 0]), "heads")
        reduced.append(small if headed or not summed else torch.full_like(small, -1))
    if any(heads):
        _meet_by_head(p, (a, b), reduced, heads, batch)
    else:
        if any(sums):
            p.atoms.couple_strictly(compact(a), compact(b), _LONE)
        if all(bool((ids >= 0).any()) for ids in reduced):
            for ids in reduced:
                p.atoms.freeze(ids, _MEETS)
    first, second = reduced if heads[0] or not heads[1] else reversed(reduced)
    result = first_of(first, second)
    return spread(result.reshape(result.shape[: len(made)]), shape)


def _aligned(ids: Tensor, names: Sequence[str], every: Sequence[str]) -> Tensor:
    """Return ids with one dimension for each of `every`, of size 1 where there was none."""
    order = [names.index(name) for name in every if name in names]
    ids = ids.permute(order)
    for dim, name in enumerate(every):
        if name not in names:
            ids = ids.unsqueeze(dim)
    return ids


def _narrowed(ids: Tensor, dims: Sequence[int]) -> Tensor:
    ids = compact(ids)
    for dim in dims:
        ids = ids.narrow(dim, 0, 1)
    return ids


def _meet_by_head(
    p: Propagation, operands: Sequence[Tensor], reduced: Sequence[Tensor], heads: Sequence[bool], batch: Sequence[int]
) -> None:
    """Couple the heads of two operands; what all heads of the other one read stays."""
    if all(heads):
        p.atoms.couple(*reduced, heads=True)
        p.atoms.couple_strictly(reduced[0], reduced[1], _LONE)
        return
    headed = 0 if heads[0] else 1
    other = operands[1 - headed]
    p.atoms.freeze(other, SHARED)
    fixed = any(varies(operands[headed], dim) and other.shape[dim] > 1 for dim in batch)
    if fixed and not bool((compact(other) >= 0).any()):
        p.atoms.freeze(reduced[headed], _LONE)


def matrices(p: Propagation, node: Node, left: Node, right: Node) -> Any:
    """Multiply matrices, or batches of them, none of which is a parameter."""
    if p.parameter(left) is not None or p.parameter(right) is not None:
        return p.unknown(node, _WEIGHT)
    a, b = p.ids(left), p.ids(right)
    if a.dim() < 2 or b.dim() < 2:
        return p.unknown(node)
    return _multiplied(p, a, b, shape_of(node) or ())


def _multiplied(p: Propagation, a: Tensor, b: Tensor, shape: Sequence[int]) -> Tensor:
    batch = [f"batch{dim}" for dim in range(len(shape) - 2)]
    a, b = (ids[(None,) * (len(shape) - ids.dim())] for ids in (a, b))
    labels = ([*batch, "row", "sum"], [*batch, "sum", "column"])
    return product(p, (a, b), labels, [*batch, "row", "column"], shape)


def _baddbmm(p: Propagation, node: Node) -> Any:
    added, left, right = cast(tuple[Node, Node, Node], node.args[:3])
    made = matrices(p, node, left, right)
    return p.meet(shape_of(node) or (), [made, p.ids(added)])


def _einsum(p: Propagation, node: Node) -> Any:
    """Follow an Einstein sum of one or two tensors in which no dimension stands twice in one of them."""
    equation, parts = cast(str, node.args[0]), cast(Sequence[Node], node.args[1])
    if any(p.parameter(part) is not None for part in parts):
        return p.unknown(node, _WEIGHT)
    shape, tensors = shape_of(node) or (), [p.ids(part) for part in parts]
    names = _einsum_labels(equation, [ids.dim() for ids in tensors])
    if len(tensors) > 2 or names is None:
        return p.unknown(node, "read by an Einstein sum of a form in which channels are not followed")
    *read, made = names
    if len(tensors) == 1:
        tensors, read = [*tensors, p.nothing(())], [*read, []]
    return product(p, tensors, read, made, shape)


def _einsum_labels(equation: str, dims: Sequence[int]) -> list[list[str]] | None:
    """Return the names of the dimensions of the operands and of the result; `None` where one stands twice.

    Example:
        >>> _einsum_labels("...qd,...kd->...qk", [3, 3])
        [['0', 'q', 'd'], ['0', 'k', 'd'], ['0', 'q', 'k']]
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(dims):
        return None
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    wide = max((dim - len(term.replace("...", "")) for term, dim in zip(terms, dims, strict=True)), default=0)
    read = []
    for term, dim in zip([*terms, right], [*dims, None], strict=True):
        count = wide if dim is None else dim - len(term.replace("...", ""))
        before, dots, after = term.partition("...")
        read.append([*before, *(map(str, range(wide - count, wide)) if dots else ()), *after])
    return read if all(len(set(names)) == len(names) for names in read) else None


def _attention(p: Propagation, node: Node) -> Any:
    """Follow scaled dot-product attention as the two products and the softmax that it is."""
    q, k, v = (p.ids(part) for part in node.args[:3])
    if any(p.parameter(part) is not None for part in node.args[:3]):
        return p.unknown(node, _WEIGHT)
    if argument(node, "enable_gqa") and q.dim() > 2:
        k, v = (ids.repeat_interleave(q.shape[-3] // ids.shape[-3], -3) for ids in (k, v))
    for part in (q, k):
        if argument(node, "scale") is None:
            p.atoms.require_constant(part, [-1], "the scale of attention follows from the size of a head")
    for part in (q, k, v):
        p.atoms.require_constant(part, [-2], "positions of attention")
    shape = shape_of(node) or ()
    weights = [*shape[:-1], k.shape[-2]]
    scores = _multiplied(p, q, k.mT, weights)
    mask = argument(node, "attn_mask")
    if mask is not None:
        scores = p.meet(weights, [scores, p.ids(mask)])
        p.atoms.require_constant(scores, [-1], "positions of attention")
    return _multiplied(p, scores, v, shape)


ATTENTION: dict[str, Handler] = {
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
"""Operator → what handles it."""
