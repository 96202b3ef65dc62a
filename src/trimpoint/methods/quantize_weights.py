"""Weights of 8, 4, 3 or 2 bits, activations as they are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from trimpoint.errors import InvalidParameterError
from trimpoint.graph import OnGroups, kept_by, why_not_held
from trimpoint.method import Bounds, Context, Fact, Method, Site, Stage, Traits, param
from trimpoint.quantization.groups import Groups, awq, gptq_groups, hqq, searched, widest
from trimpoint.quantization.rounding import error_of
from trimpoint.sparsity.inputs import gather, own_forward
from trimpoint.values import Format

BY_DATA = ("gptq", "awq")
_GROUPS = (0, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Method):
    """Store the weights of linear layers in 8, 4, 3 or 2 bits with a scale for each group of inputs (weight-only).

    When it pays:
        Large linear layers at batch 1, where reading weights takes the time: language models. A layer of 4096 × 4096 in
        ONNX Runtime on one AVX2 core: 4 bits in groups of 32 4.4 times as fast as float32, 8 bits 2.6 times, with
        `activations="int8"`. Models that fit into the cache of the processor, and batches of 8 or more, get no faster
        and may get slower. The file shrinks to an eighth at 4 bits. 3 bits take the room of 4, since no kernel has
        them: they save only where a file is coded.
    What it costs:
        Seconds with `nearest` and `hqq`; with `gptq` and `awq` a forward pass over the calibration data as well. At 8
        bits, and at 4 bits in groups, quality hardly falls; at 3 bits `gptq` in groups is needed, 2 bits want training
        behind this step. With `activations="float32"` products of 2 and 8 bits are very slow in ONNX Runtime; OpenVINO
        computes all of them in float32 and rounds inputs only on CPUs with 8-bit dot products, where that is allowed.
    Needs:
        `calibrate` data with `gptq` and `awq`.
    Leaves alone:
        Everything but linear layers, those whose weight is shared with another module, and those that compute something
        else than a product with it. Their weights are put on a grid, and stay on it when they are trained.

    References:
        Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers" (2023); Lin
        et al., "AWQ: activation-aware weight quantization for LLM compression and acceleration" (2023), with the root
        mean square of an input for its mean magnitude; Badri and Shaji, "Half-quadratic quantization of large machine
        learning models" (2023), with whole zero points.
    """

    bits: int = param(4, doc="of a weight", bounds=Bounds(ge=2, le=8), search=(8, 4))
    group: int = param(
        32,
        doc="inputs that share a scale: 16, 32, 64, 128 or 256; 0 is one scale per output channel",
        bounds=Bounds(ge=0, le=256),
    )
    rounding: str = param(
        "gptq",
        doc="to the nearest number, or the one that the layer's output asks for, with scaled inputs, or with zero "
        "points for the bulk of the weights",
        choices=("nearest", "gptq", "awq", "hqq"),
    )
    scale: str = param(
        "error", doc="range of a group: all its weights, or the share of least error", choices=("largest", "error")
    )
    symmetric: bool = param(False, doc="no zero points")
    activations: str = param(
        "int8",
        doc="type that a kernel may round activations to, in blocks, before it multiplies",
        choices=("int8", "float32"),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE,
        targets=("Linear",),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.FLOAT_WEIGHT,
        reduces=frozenset({"file_bytes"}),
        needs=frozenset({"calibrate"}),
        status="experimental",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in _GROUPS:
            raise InvalidParameterError(
                f"The 'group' parameter of QuantizeWeights must be one of {', '.join(map(str, _GROUPS))}. Got "
                f"{self.group!r}.",
                "kernels take groups of a power of two; 0 is one scale for each output channel",
            )
        if self.rounding == "hqq" and self.symmetric:
            raise InvalidParameterError(
                "The 'symmetric' parameter of QuantizeWeights must be False with rounding='hqq'. Got True.",
                "what is chosen there are zero points",
            )

    @property
    def formats(self) -> Mapping[str, Format]:
        """The format of a weight, and that of what it is multiplied with where a kernel may round that."""
        granularity: Literal["group", "channel"] = "group" if self.group else "channel"
        weight = Format(dtype=f"uint{self.bits}", granularity=granularity, symmetric=self.symmetric)
        rounded = {"input": Format(dtype="int8", granularity="group")} if self.activations == "int8" else {}
        return {"weight": weight, **rounded}

    def apply(self, ctx: Context) -> None:
        """Choose the integers of every linear layer in scope and assign the formats."""
        chosen = {}
        for site in ctx.modules():
            if reason := _why_not(site):
                ctx.skip(site.path, reason)
            else:
                chosen[site.path] = site.module
        for done, (path, products) in enumerate(self._products(ctx, chosen)):
            ctx.report(f"choosing integers of {path}", done / len(chosen))
            grid, values = self._on_grid(chosen[path], products)
            seen = "" if products is None else ", by its inputs"
            ctx.put_on_grid(path, grid, values=values, reason=f"{self.rounding}, scale by {self.scale}{seen}")
            for tensor, format in self.formats.items():
                ctx.assign(path, cast(Literal["weight", "input"], tensor), format)

    def _products(self, ctx: Context, chosen: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor | None]]:
        """Yield each path with the mean of xxᵀ over its inputs, `None` where it saw none or that is not needed."""
        if self.rounding not in BY_DATA:
            yield from ((path, None) for path in chosen)
            return
        for path, seen in gather(ctx, chosen, products=True):
            yield path, None if seen.total is None else seen.total[0] / seen.positions

    @torch.no_grad()
    def _on_grid(self, module: nn.Module, products: Tensor | None) -> tuple[OnGroups, Tensor]:
        weight = cast(Tensor, module.weight).detach().double()
        size, factor = self.group or weight.shape[1], torch.ones(weight.shape[1], dtype=torch.float64)
        size = min(size, weight.shape[1])
        squares = None if products is None else products.diagonal()

        def groups_of(rows: Tensor, counts: Tensor | None = None) -> Groups:
            if self.scale == "largest":
                return widest(rows, size, self.bits, self.symmetric)
            return searched(rows, size, self.bits, self.symmetric, counts)

        groups = groups_of(weight, squares)
        values = groups.nearest(weight)
        if self.rounding == "hqq" and not self.symmetric:
            groups = hqq(weight, groups)
            values = groups.nearest(weight)
        elif self.rounding == "gptq" and products is not None:
            found = gptq_groups(weight, groups, products, kept_by(module))
            better = error_of(found - weight, products) < error_of(values - weight, products)
            values = torch.where(better[:, None], found, values)
        elif self.rounding == "awq" and products is not None and squares is not None:
            scaled = awq(weight, products, squares.sqrt(), groups_of)
            # The factors cost a multiplication at run time, so they have to bring something.
            if error_of(scaled[2] - weight, products).sum() < 0.98 * error_of(values - weight, products).sum():
                factor, groups, values = scaled
        numbers: tuple[Any, ...] = (groups.scale.float(), groups.zero.float(), self.bits, size, factor.float())
        return OnGroups(*numbers), values


def _why_not(site: Site) -> str:
    """Return why the integers of a linear layer cannot be chosen, or `""`."""
    if site.tied:
        return "it shares a weight with another module"
    return why_not_held(site.module, "weight") or own_forward(site.module)
