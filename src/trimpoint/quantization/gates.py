"""Gates of recurrent layers as units of their own: what each number of bits makes of one, and all of them together.

A gate of a layer and direction has rows in two matrices, `weight_ih` and `weight_hh`, and what they make is added; both
have the same number of bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from trimpoint.graph import OnGates, why_not_held
from trimpoint.graph.held import parameter_behind
from trimpoint.method import Context
from trimpoint.quantization.rounding import best_scale, nearest

NAMES = {4: ("input", "forget", "cell", "output"), 3: ("reset", "update", "new"), 1: ("hidden",)}
"""Number of gates → their names, in the order of their rows: LSTM, GRU and plain recurrent layers."""
MOST_BITS = 7
"""With 8, sums of the runtime's kernel saturate on CPUs without 8-bit dot products."""
Rounded = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a weight → the values of a gate's rows, and the scale of each."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate of one layer and direction of the recurrent module at `path`; `layer` is such as `l0_reverse`."""

    path: str
    layer: str
    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.path} {self.layer} {NAMES[self.count][self.index]}".strip()

    @property
    def parameters(self) -> tuple[str, str]:
        """The names of the weights that it has rows of."""
        return f"weight_ih_{self.layer}", f"weight_hh_{self.layer}"

    def rows(self, weight: Tensor) -> Tensor:
        """Return its rows of a weight, as a view."""
        return weight.chunk(self.count)[self.index]


def why_no_gates(module: nn.RNNBase) -> str:
    """Return why the gates of a recurrent layer cannot have integers of their own, or `""`."""
    if module.proj_size:
        return "it projects its hidden state"
    names = [name for name in module._flat_weights_names if name.startswith("weight")]
    return next((reason for name in names if (reason := why_not_held(module, name))), "")


def gates_of(module: nn.RNNBase, path: str) -> list[Gate]:
    """Return all gates of a recurrent layer, layer by layer, direction by direction."""
    count = len(cast(Tensor, module.weight_hh_l0)) // module.hidden_size
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [
        Gate(path=path, layer=f"l{layer}{direction}", index=index, count=count)
        for layer in range(module.num_layers)
        for direction in directions
        for index in range(count)
    ]


@torch.no_grad()
def gate_choices(module: nn.Module, gate: Gate, bits: Sequence[int]) -> dict[int, Rounded]:
    """Return for each number of bits the rows of a gate rounded to nearest, at the scales of least error."""
    found: dict[int, Rounded] = {}
    for count in bits:
        made, top = {}, 2 ** (count - 1) - 1
        for name in gate.parameters:
            rows = gate.rows(cast(Tensor, getattr(module, name)).detach())
            scale = best_scale(rows, top)
            made[name] = (nearest(rows, scale, top).to(rows.dtype), scale)
        found[count] = made
    return found


@contextmanager
def gate_as(module: nn.Module, gate: Gate, rounded: Rounded) -> Iterator[None]:
    """Let a gate have other weights for a while."""
    rows = {name: gate.rows(parameter_behind(module, name).data) for name in gate.parameters}
    before = {name: each.clone() for name, each in rows.items()}
    try:
        for name, each in rows.items():
            each.copy_(rounded[name][0])
        yield
    finally:
        for name, each in rows.items():
            each.copy_(before[name])


@torch.no_grad()
def put_gates(ctx: Context, chosen: Mapping[Gate, tuple[int, Rounded]]) -> None:
    """Hold the weights of recurrent layers on grids.

    Args:
        ctx: of the step.
        chosen: all gates of the modules that are changed, in the order of their rows → bits, and what they make.
    """
    layers: dict[tuple[str, str], list[Gate]] = {}
    for gate in chosen:
        layers.setdefault((gate.path, gate.layer), []).append(gate)
    for (path, layer), gates in layers.items():
        bits = [chosen[gate][0] for gate in gates]
        told = f"bits of gates of {layer}: " + ", ".join(
            f"{NAMES[gate.count][gate.index]} {count}" for gate, count in zip(gates, bits, strict=True)
        )
        for name in gates[0].parameters:
            scale = torch.cat([chosen[gate][1][name][1] for gate in gates]).float()
            values = torch.cat([chosen[gate][1][name][0] for gate in gates])
            ctx.put_on_grid(path, OnGates(scale, bits), parameter=name, values=values, reason=told)
            told = ""
