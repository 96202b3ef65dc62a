"""Remove hidden units of recurrent layers, with all their gates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from trimpoint.importance.pruning import UnitPruning
from trimpoint.method import Bounds, Fact, Stage, Traits, param
from trimpoint.parts import Group


@dataclass(frozen=True, kw_only=True)
class PruneRecurrent(UnitPruning):
    """Remove the least important hidden units of LSTM, GRU and plain recurrent layers: smaller dense layers are left.

    A unit goes with its rows in all gates, its column of the recurrent weights, and whatever reads it. The layers and
    directions of one module have one hidden size, so each of them loses equally many units, its own least important
    ones.

    When it pays:
        Where recurrent layers take most of the time. Their multiplications fall with the square of the hidden size, but
        for those with the first layer's inputs, and in ONNX Runtime their time does too: two LSTM layers of 256 units
        at batch 1 take about a quarter of it with 128. Where a step costs more than its multiplications (small layers,
        runtimes that start a kernel for each step), less is gained.
    What it costs:
        Quality falls with the ratio; plan a recovery step behind it. `taylor` costs a backward pass over the
        calibration data, `fisher` and `group-fisher` one for each of up to 256 single samples.
    Needs:
        Example inputs to find the coupled units; for `activation` also `calibrate` data, for `taylor`, `fisher` and
        `group-fisher` `calibrate` data and a loss.
    Leaves alone:
        Modules one of whose layers reaches the model's output or a normalisation, gets its initial state from the
        caller or projects it (`proj_size`), those whose directions are summed over a dimension of their own
        (`h_n.sum(0)`, `view(batch, length, 2, hidden).sum(2)`; a sum of the two parts of `chunk(2, -1)` is fine), those
        with no more hidden units than `round_to`, with `taylor`, `fisher` and `group-fisher` those by which the loss
        has no gradient, and all units that are not of recurrent layers; each is listed with its reason. A model that
        packs its sequences cannot be traced: pad them instead.

    References:
        Wen et al., "Learning intrinsic sparse structures within long short-term memory" (2018), for what goes together
        with a hidden unit; Hochreiter and Schmidhuber, "Long short-term memory" (1997), and Cho et al., "Learning
        phrase representations using RNN encoder-decoder for statistical machine translation" (2014), for the layers;
        the criteria of importance are cited in `trimpoint.importance.criteria`.
    """

    units = "hidden"

    round_to: int = param(
        8,
        doc="hidden sizes that are reduced become the nearest multiple of this; from one that is no multiple, more "
        "than `ratio` may go",
        bounds=Bounds(ge=1),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.STRUCTURE,
        acts_on="groups",
        targets=("RNNBase", "RNNCellBase"),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.ORIGINAL_SHAPE,
        reduces=frozenset({"params", "macs", "file_bytes"}),
    )

    def unfit(self, model: nn.Module, alike: Sequence[Group]) -> str:  # noqa: ARG002
        """Return why groups that must stay equally large are left alone, or `""`."""
        group, hidden = alike[0], alike[0].size * _width(alike)
        if hidden <= self.round_to:
            return f"its {hidden} hidden units are no more than round_to={self.round_to}"
        rounds_to_none = self.ratio > 0 and self.rounded(alike, self.kept(group)) >= group.size
        return self.none_goes(group, self.kept(group)) if rounds_to_none else ""

    def multiple(self, alike: Sequence[Group]) -> int:
        """Return of how many units each of some groups keeps a multiple."""
        return self.round_to // math.gcd(self.round_to, _width(alike))


def _width(alike: Sequence[Group]) -> int:
    """Return how many hidden units of a layer go with each unit of a group: more than 1 where some are coupled."""
    return max(min(len(member.indices[0]) for member in group.members) for group in alike)
