"""Remove channels and neurons, over everything that they run through."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from trimpoint.importance import between_groups
from trimpoint.importance.pruning import UnitPruning, ranked_together
from trimpoint.method import Bounds, Fact, Stage, Traits, param
from trimpoint.parts import Group


@dataclass(frozen=True, kw_only=True)
class PruneChannels(UnitPruning):
    """Remove the least important channels of convolutions and neurons of linear layers.

    When it pays:
        Where layers are wide, with widths that stay multiples of 8 or 16; before quantisation. On narrow networks
        removing blocks is worth more: time does not fall with the multiplications.
    What it costs:
        Quality falls with the ratio; plan a recovery step behind it. Pruning in several rounds is a plan of several
        steps, each followed by a recovery: `ratio` is a share of the units that are there when the step begins, so
        that two steps of 0.3 leave 0.49 of them, before rounding. `taylor` costs a backward pass over the calibration
        data, `fisher` and `group-fisher` one for each of up to 256 single samples, `activation` a forward pass.
    Needs:
        Example inputs to find the coupled channels; for `activation` also `calibrate` data, for `taylor`, `fisher` and
        `group-fisher` `calibrate` data and a loss.
    Leaves alone:
        Channels of the model's inputs and outputs, groups that are no wider than `round_to`, attention heads, hidden
        units of recurrent layers, what could not be traced, and with `taylor`, `fisher` and `group-fisher` groups by
        which the loss has no gradient; each is listed with its reason.

    References:
        Li et al., "Pruning filters for efficient ConvNets" (2017), and Fang et al., "DepGraph: towards any structural
        pruning" (2023), for the magnitude of a coupled group; Molchanov et al., "Importance estimation for neural
        network pruning" (2019), for the first-order Taylor expansion; the other criteria are cited in
        `trimpoint.importance.criteria`. Fang et al., "Isomorphic pruning for vision models" (2024), for ranking groups
        of one structure together.
    """

    units = "channels"

    round_to: int = param(
        8,
        doc="widths that lose channels become the nearest multiple of this many; from one that is no multiple, more "
        "than `ratio` may go",
        bounds=Bounds(ge=1),
    )
    scope: str = param(
        "local",
        doc="the same share of each group, or the least important of all groups (scores divided by their group's "
        "mean), or of all groups of one structure (scores as they are)",
        choices=("local", "global", "isomorphic"),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.STRUCTURE,
        acts_on="groups",
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.ORIGINAL_SHAPE,
        reduces=frozenset({"params", "macs", "file_bytes"}),
    )

    def unfit(self, model: nn.Module, alike: Sequence[Group]) -> str:  # noqa: ARG002
        """Return why a group is left alone, or `""`."""
        width = alike[0].size * channels(alike[0])
        return f"its {width} channels are no more than round_to={self.round_to}" if width <= self.round_to else ""

    def multiple(self, alike: Sequence[Group]) -> int:
        """Return of how many units a group keeps a multiple."""
        return self.round_to // math.gcd(self.round_to, channels(alike[0]))

    def wanted(self, model: nn.Module, groups: Sequence[Group], found: Mapping[str, Tensor]) -> dict[str, int]:
        """Return how many units each group is to keep, before rounding."""
        if self.scope == "local":
            return super().wanted(model, groups, found)
        if self.scope == "global":
            return ranked_together(groups, between_groups(found, self.importance), self.ratio)
        isomorphic: dict[object, list[Group]] = {}
        for group in groups:
            isomorphic.setdefault(structure(model, group), []).append(group)
        ranked = [ranked_together(some, found, self.ratio) for some in isomorphic.values()]
        return {name: kept for some in ranked for name, kept in some.items()}


def channels(group: Group) -> int:
    """Return how many channels of its first producing module each unit of a group has."""
    first = next((member for member in group.members if member.role == "out"), group.members[0])
    return len(first.indices[0])


def structure(module: nn.Module, group: Group) -> tuple[tuple[str, str, int, str], ...]:
    """Return what isomorphic groups share: the classes of the modules that a unit runs through, in order, and how."""
    return tuple((type(module.get_submodule(m.path)).__name__, m.parameter, m.dim, m.role) for m in group.members)
