"""The built-in criteria: from a group and the evidence to the importance of each unit, higher is more important.

A unit is everything that goes with it: its slices of all the parameters that produce it, pass it on or consume it. So a
channel, a neuron, an attention head and a hidden unit of a recurrent layer are judged alike.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trimpoint.importance.evidence import Evidence
from trimpoint.parts import Group

Criterion = Callable[[Group, Evidence], Tensor | None]
"""Gives nothing where it knows nothing of a group: there is no order to remove units by then."""


def magnitude(group: Group, evidence: Evidence) -> Tensor:
    """Return the size of each unit's weights: squared L2 norm, `[units]`.

    For each member, divided by the mean over units, so that large layers do not drown small ones; then the mean over
    members (group L2 with mean reduction, Fang et al., "DepGraph: towards any structural pruning", 2023). Biases,
    running statistics and weights that are all zero do not count.
    """
    return _reduced(group, [values.square().sum(1) for _, values in evidence.weights(group)])


def l1(group: Group, evidence: Evidence) -> Tensor:
    """Return the size of each unit's weights: L1 norm, reduced as for `magnitude`, `[units]`.

    Li et al., "Pruning filters for efficient ConvNets" (2017), there for the filters alone.
    """
    return _reduced(group, [values.abs().sum(1) for _, values in evidence.weights(group)])


def taylor(group: Group, evidence: Evidence) -> Tensor | None:
    """Return the first-order Taylor expansion of the loss, `[units]`.

    For each batch of the calibration data and each module that the unit runs through, the square of the sum of
    gradient times weight over the unit's slice (Molchanov et al., "Importance estimation for neural network pruning",
    2019, equation 8); summed over modules and batches.
    """
    change: dict[tuple[str, str], Tensor] = {}
    for member, products in evidence.batch_products(group):
        key = (member.path, member.role)
        change[key] = change[key] + products if key in change else products
    return _total([values.square().sum(0) for values in change.values()])


def fisher(group: Group, evidence: Evidence) -> Tensor | None:
    """Return half the sum of squared weights times the diagonal of the empirical Fisher information, `[units]`.

    The saliency of LeCun, Denker and Solla, "Optimal brain damage" (1990), summed over a unit, with the mean squared
    gradient of single samples for the diagonal of the Hessian.
    """
    parts = [
        (evidence.slices(member).square() * curvature).sum(1) / 2
        for member, curvature in evidence.squared_gradients(group)
    ]
    return _total(parts)


def group_fisher(group: Group, evidence: Evidence) -> Tensor | None:
    """Return half the Fisher information of a gate on each unit, `[units]`.

    For each module that the unit runs through, the square of the sum of gradient times weight over the unit's slice,
    for single samples; averaged over samples and summed over modules. Weights of one unit count together, unlike in
    `fisher` (Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018; Liu et al., "Group
    Fisher pruning for practical network compression", 2021, for coupled channels).
    """
    change: dict[tuple[str, str], Tensor] = {}
    for member, products in evidence.sample_products(group):
        key = (member.path, member.role)
        change[key] = change[key] + products if key in change else products
    return _total([values.square().mean(0) / 2 for values in change.values()])


def activation(group: Group, evidence: Evidence) -> Tensor:
    """Return the mean absolute activation of each unit, `[units]`.

    It is taken where the unit is read, behind norms and nonlinearities, over all calibration samples and positions
    (the mean activation of Molchanov et al., "Pruning convolutional neural networks for resource efficient inference",
    2017); for each module that reads it divided by the mean over units, then the mean over modules. Groups whose
    activations no module reads or returns get their `magnitude`.
    """
    found = [values for _, values in evidence.activations(group)]
    return _reduced(group, found) if found else magnitude(group, evidence)


def geometric_median(group: Group, evidence: Evidence) -> Tensor:
    """Return the sum of distances from each unit's weights to those of all others, `[units]`.

    The unit nearest to the geometric median can be replaced best by the rest (He et al., "Filter pruning via geometric
    median for deep convolutional neural networks acceleration", 2019). Of the weights that produce the unit; for each
    such member divided by the mean over units, then the mean over members.
    """
    makers = [values for member, values in evidence.weights(group) if member.role == "out"]
    exact = "donot_use_mm_for_euclid_dist"
    return _reduced(group, [torch.cdist(values, values, compute_mode=exact).sum(1) for values in makers])


def bn_scale(group: Group, evidence: Evidence) -> Tensor:
    """Return the absolute scale of each unit in the batch norms that it runs through, their mean, `[units]`.

    Liu et al., "Learning efficient convolutional networks through network slimming" (2017). Groups that run through no
    batch norm with a scale get their `magnitude`.
    """
    norms = [
        values.abs().mean(1)
        for member, values in evidence.weights(group)
        if member.role == "through"
        and isinstance(evidence.module.get_submodule(member.path), nn.modules.batchnorm._NormBase)
    ]
    return torch.stack(norms).mean(0) if norms else magnitude(group, evidence)


def lamp(group: Group, evidence: Evidence) -> Tensor:
    """Return the magnitude as a share of that of all units that are no less important, `[units]`.

    Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning" (2021), with the group's magnitude in the
    place of a squared weight. Within a group the order is that of `magnitude`; the values are made to be compared
    between groups, and the most important unit of each has 1.
    """
    size = magnitude(group, evidence)
    order = torch.argsort(size, stable=True)
    rising = size[order]
    left = rising.flip(0).cumsum(0).flip(0)
    return torch.empty_like(size).scatter_(0, order, rising / left.clamp_min(torch.finfo(left.dtype).tiny))


def random(group: Group, evidence: Evidence) -> Tensor:
    """Return random numbers in [0, 1), seeded by the plan, `[units]`: the control that every criterion must beat."""
    return torch.from_numpy(evidence.rng.random(group.size))


BUILT_IN: dict[str, Criterion] = {
    "magnitude": magnitude,
    "l1": l1,
    "taylor": taylor,
    "fisher": fisher,
    "group-fisher": group_fisher,
    "activation": activation,
    "geometric-median": geometric_median,
    "bn-scale": bn_scale,
    "lamp": lamp,
    "random": random,
}
"""Name → criterion."""

BETWEEN_GROUPS = frozenset({"lamp"})
"""Criteria whose values are already made to be compared between groups."""


def _reduced(group: Group, parts: Sequence[Tensor]) -> Tensor:
    """Return the mean of what members say, each divided by its mean over units; ones where they say nothing."""
    said = [values / values.mean() for values in parts if bool(values.any())]
    return torch.stack(said).mean(0) if said else torch.ones(group.size, dtype=torch.float64)


def _total(parts: Sequence[Tensor]) -> Tensor | None:
    """Return the sum of what gradients tell; nothing where there are none, as under `torch.no_grad()`."""
    return sum(parts[1:], parts[0]) if parts else None
