"""Parts of a model that can be removed or scaled: units of coupled groups, and blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Member:
    """One dimension of one parameter that belongs to a coupled group.

    Args:
        path: of the module that owns the parameter.
        parameter: its name in that module (`"weight"`, `"bias"`, `"running_mean"`, …).
        dim: the dimension.
        indices: `indices[unit]` are the positions along `dim` that go when `unit` of the group goes.
        role: whether this parameter produces the channels (an output dimension), consumes them (an input dimension)
            or passes them through (norms, depthwise).
    """

    path: str
    parameter: str
    dim: int
    indices: tuple[tuple[int, ...], ...]
    role: Literal["out", "in", "through"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A module whose code gives tensors a shape in which the units of a group can be counted.

    Args:
        path: of the module.
        sizes: pairs of the size of a dimension and how many of its positions belong to one unit.
    """

    path: str
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that can only be removed whole, over all the parameters that they run through.

    Args:
        members: every dimension that loses positions when a unit is removed.
        size: number of removable units (channels, neurons, attention heads, hidden units of a recurrent layer).
        reason: why the group must not be touched; empty when it is removable.
        label: its name, where the path of its first producer would not be unique.
        kind: what a unit is: a channel of a convolution or a neuron, an attention head, or a hidden unit of a recurrent
            layer.
        alike: groups in which this is the same, and not empty, must keep equally many units, such as the layers of one
            LSTM module.
        places: for attention heads, the modules whose code states how many there are.
    """

    members: tuple[Member, ...]
    size: int
    reason: str = ""
    label: str = ""
    kind: Literal["channels", "heads", "hidden"] = "channels"
    alike: str = ""
    places: tuple[Place, ...] = ()

    @property
    def name(self) -> str:
        """Path of the first module that produces the channels, or `label`: a stable, readable, unique name."""
        return self.label or next(
            (member.path for member in self.members if member.role == "out"), self.members[0].path
        )


@dataclass(frozen=True, kw_only=True)
class Scalings:
    """Where a model can be scaled.

    Args:
        groups: of channels; what makes them has the role `out`, or `through` where a batch norm behind it is scaled in
            its place, what reads them the role `in`. Those that cannot be scaled carry a `reason`, and
            may lack either.
        norms: path of a layer → path of the batch norm that is the only reader of its output.
    """

    groups: tuple[Group, ...]
    norms: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A module that can be bypassed because its output has the structure and shapes of its first input.

    Args:
        path: of the module.
        shape: of its output for the example input, batch included.
        params: how many parameters it owns.
        family: what blocks that can stand for each other share (type and shape); one stage of a ResNet is one family.
    """

    path: str
    shape: tuple[int, ...]
    params: int
    family: str


@dataclass(frozen=True, kw_only=True)
class MaskSchedule:
    """How a mask of a weight comes about while the model is trained.

    Args:
        removed: weights that are zero at the end.
        steps: training steps until then.
        rank: which go: the smallest, or the smallest but for what training moves towards zero
            or away from it (Sanh, Wolf and Rush 2020).
        curve: all at the end, or by the cubic schedule (Zhu and Gupta 2018).
        start: weights that are zero before the first step.
        of: where not 0, equally many of every run of so many weights along dimension 1 go.
    """

    removed: int
    steps: int
    rank: Literal["magnitude", "movement"] = "magnitude"
    curve: Literal["one-shot", "cubic"] = "cubic"
    start: int = 0
    of: int = 0
