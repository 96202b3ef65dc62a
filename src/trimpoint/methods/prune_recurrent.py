"""Remove hidden units of recurrent layers, with all their gates."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from trimpoint.importance import NAMES, scores
from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.parts import Block, Group

_OTHER_UNITS = {
    "channels": "its units are channels, no hidden units of a recurrent layer",
    "heads": "its units are attention heads, no hidden units of a recurrent layer",
}


@dataclass(frozen=True, kw_only=True)
class PruneRecurrent(Method):
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
        caller or projects it (`proj_size`), those with no more hidden units than `round_to`, and all units that are not
        of recurrent layers; each is listed with its reason. A model that packs its sequences cannot be traced: pad them
        instead.

    References:
        Wen et al., "Learning intrinsic sparse structures within long short-term memory" (2018), for what goes together
        with a hidden unit; Hochreiter and Schmidhuber, "Long short-term memory" (1997), and Cho et al., "Learning
        phrase representations using RNN encoder-decoder for statistical machine translation" (2014), for the layers;
        the criteria of importance are cited in `trimpoint.importance.criteria`.
    """

    ratio: float = param(
        0.5,
        doc="share to remove of the hidden units that there are now",
        bounds=Bounds(ge=0, lt=1),
        noop=0.0,
        weak=0.25,
        search=(0.25, 0.5, 0.75),
    )
    importance: str = param(
        "magnitude",
        doc="what makes a unit important, or `package.module:attribute` for a function of your own from a group and "
        "the evidence to one number for each unit",
        choices=NAMES,
        reference=True,
    )
    round_to: int = param(8, doc="kept hidden sizes are multiples of this", bounds=Bounds(ge=1))

    traits: ClassVar[Traits] = Traits(
        stage=Stage.STRUCTURE,
        acts_on="groups",
        targets=("RNNBase", "RNNCellBase"),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.ORIGINAL_SHAPE,
        reduces=frozenset({"params", "macs", "file_bytes"}),
        status="experimental",
    )

    def apply(self, ctx: Context) -> None:
        """Remove the least important hidden units, equally many from all layers and directions of a module."""
        chosen: list[tuple[Group, int]] = []
        for alike in _sets(ctx.groups()):
            if reason := self._reason(alike):
                for path in _makers(alike):
                    ctx.skip(path, reason)
            else:
                chosen += [(group, self._kept(alike)) for group in alike]
        if not chosen:
            return
        found = scores(ctx, [group for group, _ in chosen], self.importance)
        removals = {}
        for group, kept in chosen:
            order = torch.argsort(found[group.name], stable=True)
            removals[group.name] = sorted(int(unit) for unit in order[: group.size - kept])
        ctx.resize(removals)

    def forecast(self, blocks: Sequence[Block], groups: Sequence[Group]) -> Mapping[str, float]:  # noqa: ARG002
        """Return the share of each module's multiplications that is left; its matrices count as equally large."""
        lost: dict[tuple[str, str, int], int] = defaultdict(int)
        sizes: dict[tuple[str, str, int], int] = defaultdict(int)
        for alike in _sets(groups):
            gone = 0 if self._reason(alike) else alike[0].size - self._kept(alike)
            for member in (member for group in alike for member in group.members if "bias" not in member.parameter):
                key = (member.path, member.parameter, member.dim)
                sizes[key] = max(sizes[key], 1 + max(position for unit in member.indices for position in unit))
                lost[key] += gone * len(member.indices[0])
        left: dict[str, dict[str, float]] = defaultdict(dict)
        for (path, parameter, dim), size in sizes.items():
            share = 1 - lost[path, parameter, dim] / size
            left[path][parameter] = left[path].get(parameter, 1.0) * share
        shares = {path: sum(parts.values()) / len(parts) for path, parts in left.items()}
        return {path: share for path, share in shares.items() if share < 1}

    def _reason(self, alike: Sequence[Group]) -> str:
        """Return why groups that must stay equally large are left alone, or `""`."""
        group = alike[0]
        if group.reason or group.kind != "hidden":
            return group.reason or _OTHER_UNITS[group.kind]
        hidden = group.size * _width(alike)
        if hidden <= self.round_to:
            return f"its {hidden} hidden units are no more than round_to={self.round_to}"
        if self.ratio == 0:
            return "the ratio is 0"
        if self._kept(alike) >= group.size:
            return f"removing {math.floor(group.size * self.ratio)} of {group.size} hidden units rounds to none"
        return ""

    def _kept(self, alike: Sequence[Group]) -> int:
        """Return how many units each of some groups keeps: those whose hidden size is a multiple of `round_to`."""
        size = alike[0].size
        step = self.round_to // math.gcd(self.round_to, _width(alike))
        wanted = size - math.floor(size * self.ratio)
        return min(size, max(1, math.floor(wanted / step + 0.5)) * step)


def _sets(groups: Iterable[Group]) -> list[list[Group]]:
    """Return groups that must stay equally large together, the others each by itself."""
    sets: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        sets.setdefault((group.alike, "" if group.alike else group.name), []).append(group)
    return list(sets.values())


def _width(alike: Sequence[Group]) -> int:
    """Return how many hidden units of a layer go with each unit of a group: more than 1 where some are coupled."""
    return max(min(len(member.indices[0]) for member in group.members) for group in alike)


def _makers(groups: Sequence[Group]) -> list[str]:
    """Return the paths of the modules that make the units."""
    return list(dict.fromkeys(member.path for group in groups for member in group.members if member.role == "out"))
