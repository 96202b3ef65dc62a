"""Let weights have three values, or two."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from trimpoint.errors import InvalidParameterError
from trimpoint.graph import OnSigns, kept_by, why_not_held
from trimpoint.losses import call, explained
from trimpoint.method import Bounds, Context, Fact, Method, Site, Stage, Traits, param

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_MEAN, _LARGEST = 0.7, 0.05
"""The thresholds of ternary weight networks, and of trained ternary quantization."""


@dataclass(frozen=True, kw_only=True)
class TernarizeWeights(Method):
    """Let each weight be a positive value, a negative value or zero, or only the former two (ternary, binary weights).

    `values=3` with `scales="computed"` is TWN, with `scales="learned"` and `granularity="tensor"` TTQ; `values=2` with
    `scales="computed"` and `granularity="channel"` the binary weight networks of XNOR-Net. Activations stay as they
    are.

    When it pays:
        Where what counts is the size of the file after compression, in a download or an archive: a ternary weight takes
        at most 1.6 bits there, a binary one 1 (with one scale per tensor; scales per channel take more in a file of
        float32 values). This saves storage and no time: the file that a runtime loads is as large as before, and is
        multiplied as plain weights.
    What it costs:
        Nothing to make, and most of the quality until a recovery step behind it trains: the float weights behind stay,
        and which value each one has changes with them. Plan for several epochs.
    Needs:
        No data; with `keep_ends`, example inputs tell which layers come first and last, otherwise the order in which
        they are defined does.
    Leaves alone:
        With `keep_ends` the first and the last layer, as the papers do: they are small in most networks and cost most.
        Biases, norms, embeddings, recurrent layers; weights that are tied to others, computed from others, or all
        zero. Weights that a mask holds at zero stay zero; with two values their layers are left alone.

    References:
        Rastegari, Ordonez, Redmon and Farhadi, "XNOR-Net: ImageNet classification using binary convolutional neural
        networks" (2016); Li and Liu, "Ternary weight networks" (2016); Zhu, Han, Mao and Dally, "Trained ternary
        quantization" (2017).
    """

    values: int = param(3, doc="that a weight may have: 3, one of them zero, or 2", bounds=Bounds(ge=2, le=3))
    scales: str = param(
        "computed",
        doc="the values are the mean magnitude of the weights, with both signs, or two numbers that training learns",
        choices=("computed", "learned"),
    )
    granularity: str = param(
        "tensor", doc="values of a layer, or of each of its output channels", choices=("tensor", "channel")
    )
    threshold: float | None = param(
        None,
        doc="up to which a weight is zero: as a share of the mean magnitude, by default 0.7, or with learned scales of "
        "the largest, by default 0.05",
        bounds=Bounds(ge=0, lt=1),
    )
    keep_ends: bool = param(True, doc="leave the first and the last layer of the model in float")

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE,
        targets=("Linear", "Conv1d", "Conv2d"),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.FLOAT_WEIGHT,
        reduces=frozenset({"coded_bytes"}),
        status="experimental",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values == 2 and self.threshold is not None:
            raise InvalidParameterError(
                f"The 'threshold' parameter of TernarizeWeights must be None with two values. Got {self.threshold!r}.",
                "no weight is zero then; give `values=3`",
            )

    def apply(self, ctx: Context) -> None:
        """Hold the weight of every layer in scope to its values."""
        ends = _ends(ctx) if self.keep_ends else {}
        for site in ctx.modules():
            if reason := ends.get(site.path, "") or self._why_not(site):
                ctx.skip(site.path, reason)
                continue
            weight = cast(Tensor, site.module.weight).detach()
            channels = weight.shape[0] if self.granularity == "channel" else 1
            usual = _LARGEST if self.scales == "learned" else _MEAN
            threshold = 0.0 if self.values == 2 else usual if self.threshold is None else self.threshold
            signs = OnSigns(self.values, threshold, channels, learned=self.scales == "learned").to(weight.device)
            signs.begin_(weight)
            zeros = f", {float((signs(weight) == 0).float().mean()):.0%} zeros" if self.values == 3 else ""
            ctx.put_on_grid(site.path, signs, reason=f"{self.scales} values per {self.granularity}{zeros}")

    def _why_not(self, site: Site) -> str:
        if site.tied:
            return "its weight is tied to another module's"
        if reason := why_not_held(site.module, "weight"):
            return reason
        weight = cast(Tensor, site.module.weight).detach()
        if not bool(torch.isfinite(weight).all()):
            return "its weight is not finite"
        if self.values == 2 and not bool(kept_by(site.module).all()):
            return "a mask holds weights at zero, which would be a third value"
        return "" if bool((weight != 0).any()) else "all its weights are zero"


def _ends(ctx: Context) -> dict[str, str]:
    """Return by path why the first and the last linear layer or convolution of the whole model stay."""
    paths = list(_called(ctx)) or [path for path, part in ctx.module.named_modules() if isinstance(part, _LAYERS)]
    if not paths:
        return {}
    kept = "stays in float, where few values cost most"
    reasons = {paths[-1]: f"the last layer {kept}"} | {paths[0]: f"the first layer {kept}"}
    modules = {id(ctx.get(path)): reason for path, reason in reasons.items()}
    every = ctx.module.named_modules(remove_duplicate=False)
    return {path: modules[id(part)] for path, part in every if id(part) in modules}


@torch.no_grad()
def _called(ctx: Context) -> Iterator[str]:
    """Yield layers in the order in which they are called; none where there are no example inputs."""
    if ctx.task is None or not ctx.task.has_example:
        return
    calls: list[str] = []

    def hook_of(path: str) -> Any:
        return lambda _module, _inputs: calls.append(path)

    parts = [(path, part) for path, part in ctx.module.named_modules() if isinstance(part, _LAYERS)]
    handles = [part.register_forward_pre_hook(hook_of(path)) for path, part in parts]
    inputs = ctx.task.example_batch(2)
    try:
        with explained(inputs):
            call(ctx.module.eval(), inputs)
    finally:
        for handle in handles:
            handle.remove()
    yield from calls
