"""Hold single weights at zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from trimpoint.errors import InvalidParameterError
from trimpoint.graph import kept_by, why_not_held
from trimpoint.method import Bounds, Context, Fact, Method, Site, Stage, Traits, param
from trimpoint.parts import MaskSchedule
from trimpoint.sparsity.inputs import InputStatistics, as_matrix, from_matrix, gather, groups_of, own_forward
from trimpoint.sparsity.one_shot import Pattern, sparsegpt, wanda
from trimpoint.sparsity.ranking import comparable, least, least_of_all, least_of_each, share_of

DENSE = "unstructured"


@dataclass(frozen=True, kw_only=True)
class PruneWeights(Method):
    """Hold the least important single weights of linear layers and convolutions at zero.

    When it pays:
        Where what counts is the size of the file after compression, in a download or an archive: zeros are coded in
        almost no room. Nothing gets faster, and the file that the runtimes on CPUs load is as large as before: they
        store and multiply the zeros like any other weight. The same holds for N:M patterns there.
    What it costs:
        Half of the weights of most networks go for little quality, more after recovery; nine in ten with a schedule.
        `wanda` is a pass over the calibration data; `sparsegpt` a pass for each gigabyte of its layers' Hessians, and
        work that grows with the cube of a layer's inputs; `movement` needs a recovery step behind it that trains for
        `steps` steps, and twice the memory of the weights meanwhile; on MiniLM, fine-tuned before, it was as good as
        magnitude on the same schedule and no better.
    Needs:
        `calibrate` data for `wanda` and `sparsegpt`. With `schedule="cubic"` and with `movement` the weights go while a
        later step trains the model; if that ends before the schedule, what is missing goes at its end.
    Leaves alone:
        Biases, norms, embeddings, recurrent layers, and the projections into `nn.MultiheadAttention`, which are no
        layers of their own; weights that are tied to others or computed from others, and layers with a forward pass of
        their own, which may multiply with something else than their weight. The last weight of a layer stays.
        `wanda` and `sparsegpt` skip what the calibration data does not run through.

    References:
        Han, Pool, Tran and Dally, "Learning both weights and connections for efficient neural networks" (2015), for
        magnitude, which is the L1 and the L2 norm of a single weight alike; Zhu and Gupta, "To prune, or not to prune"
        (2018), for the cubic schedule; Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning" (2021),
        for `lamp`; Sanh, Wolf and Rush, "Movement pruning: adaptive sparsity by fine-tuning" (2020), and Sehwag et al.,
        "HYDRA: pruning adversarially robust neural networks" (2020), for scores that are learned from the magnitudes
        on; Sun, Liu, Bair and Kolter, "A simple and effective pruning approach for large language models" (2023), for
        `wanda`; Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot" (2023);
        Mishra et al., "Accelerating sparse deep neural networks" (2021), for N:M patterns.
    """

    ratio: float = param(
        0.5,
        doc="share of the weights that are zero; where there is a pattern, anything above 0 stands for that of the "
        "pattern",
        bounds=Bounds(ge=0, lt=1),
        noop=0.0,
        weak=0.25,
        search=(0.5, 0.75, 0.9),
    )
    criterion: str = param(
        "magnitude",
        doc="which go: the smallest; the smallest but for what training moves towards zero or away from it; the "
        "smallest times the norm of their input, in each row; or those without which the rest can best make up for "
        "the loss in the layer's outputs",
        choices=("magnitude", "movement", "wanda", "sparsegpt"),
    )
    scope: str = param(
        "local",
        doc="the same share of each layer, or the smallest of all layers; `global` with `magnitude` alone",
        choices=("local", "global"),
    )
    normalize: str = param(
        "none",
        doc="what magnitudes of different layers are compared by: themselves, their share of the layer's mean (l1) or "
        "root mean square (l2), or of the squares that are no smaller (lamp)",
        choices=("none", "l1", "l2", "lamp"),
    )
    pattern: str = param(
        DENSE,
        doc="`2:4` keeps two of each four weights that are next to each other along the input channels",
        choices=(DENSE, "1:2", "2:4", "4:8", "1:4", "2:8"),
    )
    schedule: str = param(
        "one-shot",
        doc="all at once (by movement: after `steps` training steps), or more and more over `steps` training steps",
        choices=("one-shot", "cubic"),
    )
    steps: int = param(
        1000, doc="training steps after which the schedule ends: half of the recovery's or less", bounds=Bounds(ge=1)
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.SPARSIFY,
        targets=("Linear", "Conv1d", "Conv2d"),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.DENSE,
        reduces=frozenset({"coded_bytes"}),
        status="experimental",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_shot = self.criterion in ("wanda", "sparsegpt")
        if self.scope == "global" and (self.criterion != "magnitude" or self.pattern != DENSE):
            what = f"pattern={self.pattern!r}" if self.criterion == "magnitude" else f"criterion={self.criterion!r}"
            raise InvalidParameterError(
                f"The 'scope' parameter of PruneWeights must be 'local' with {what}, which compares the weights of one "
                "layer. Got 'global'.",
                'take scope="local"',
            )
        if self.schedule == "cubic" and one_shot:
            raise InvalidParameterError(
                f"The 'schedule' parameter of PruneWeights must be 'one-shot' with criterion={self.criterion!r}. Got "
                "'cubic'.",
                'take criterion="magnitude" or "movement"',
            )

    def apply(self, ctx: Context) -> None:
        """Mask the weights of every module in scope."""
        sites = []
        for site in ctx.modules():
            if reason := self._why_not(site):
                ctx.skip(site.path, reason)
            else:
                sites.append(site)
        if not sites:
            return
        if self.criterion in ("wanda", "sparsegpt"):
            self._by_inputs(ctx, sites)
        else:
            self._by_size(ctx, sites)

    def _why_not(self, site: Site) -> str:
        if self.ratio == 0:
            return "the ratio is 0"
        if site.tied:
            return "its weight is tied to another module's"
        if reason := why_not_held(site.module, "weight") or own_forward(site.module):
            return reason
        weight = weight_of(site)
        if self.pattern != DENSE:
            of = pattern_of(self.pattern)[1]
            return f"its {weight.shape[1]} inputs are no multiple of {of}" if weight.shape[1] % of else ""
        if self.scope == "local" and not share_of(self.ratio, weight.numel()):
            return f"{self.ratio:g} of {weight.numel()} weights rounds to none"
        return ""

    # By the weights alone

    def _by_size(self, ctx: Context, sites: Sequence[Site]) -> None:
        weights = [weight_of(site) for site in sites]
        if self.scope == "global":
            counts = least_of_all(comparable(weights, self.normalize), self.ratio)
        elif self.pattern != DENSE:
            kept, of = pattern_of(self.pattern)
            counts = [weight.numel() * (of - kept) // of for weight in weights]
        else:
            counts = [share_of(self.ratio, weight.numel()) for weight in weights]
        for site, weight, count in zip(sites, weights, counts, strict=True):
            before = zeros_of(site)
            if count <= before:
                are = f"{before:,} of its {weight.numel():,} weights are zero already"
                ctx.skip(site.path, are if before else "none of its weights is among the least")
            elif self.schedule == "cubic" or self.criterion == "movement":
                ctx.mask(site.path, schedule=self._schedule(count, before), reason=self._words())
            else:
                ctx.mask(site.path, ~self._smallest(weight, count) & kept_by(site.module), reason=self._words())

    def _smallest(self, weight: Tensor, count: int) -> Tensor:
        size = weight.double().abs()
        if self.pattern == DENSE:
            return least([size], count)
        kept, of = pattern_of(self.pattern)
        return least_of_each([size.movedim(1, -1)], of - kept, of).movedim(-1, 1)

    def _schedule(self, count: int, before: int) -> MaskSchedule:
        return MaskSchedule(
            removed=count,
            steps=self.steps,
            rank=cast(Literal["magnitude", "movement"], self.criterion),
            curve=cast(Literal["one-shot", "cubic"], self.schedule),
            start=before,
            of=0 if self.pattern == DENSE else pattern_of(self.pattern)[1],
        )

    def _words(self) -> str:
        words = [self.criterion, *([self.pattern] if self.pattern != DENSE else []), self.scope]
        if self.schedule == "cubic" or self.criterion == "movement":
            words.append(f"{self.schedule} over {self.steps:,} training steps")
        return ", ".join(words)

    # By what the layers see

    def _by_inputs(self, ctx: Context, sites: Sequence[Site]) -> None:
        products = self.criterion == "sparsegpt"
        modules = {site.path: site for site in sites}
        for path, seen in gather(ctx, {path: site.module for path, site in modules.items()}, products=products):
            self._prune(ctx, modules[path], seen)

    def _prune(self, ctx: Context, site: Site, seen: InputStatistics) -> None:
        if seen.total is None or not seen.positions:
            return ctx.skip(site.path, "the calibration data does not run through it")
        weight, held = weight_of(site), ~kept_by(site.module)
        pattern = None if self.pattern == DENSE else pattern_of(self.pattern)
        groups = groups_of(site.module)
        ends = [share_of(self.ratio, weight.numel() * (group + 1) // groups) for group in range(groups)]
        values, removed = [], []
        for group, (matrix, before) in enumerate(
            zip(as_matrix(weight).chunk(groups), as_matrix(held).chunk(groups), strict=True)
        ):
            if self.criterion == "sparsegpt":
                count = ends[group] - (ends[group - 1] if group else 0)
                known = before if bool(before.any()) else None
                new, gone = sparsegpt(matrix, seen.total[group], count, pattern, held=known)
                values.append(new)
            else:
                gone = wanda(matrix, seen.total[group], self.ratio, pattern) | before
            removed.append(gone)
        gone = from_matrix(torch.cat(removed), weight.shape)
        if int(gone.sum()) <= zeros_of(site):
            return ctx.skip(site.path, "none of its weights is among the least")
        left = from_matrix(torch.cat(values), weight.shape).to(weight.dtype) if values else None
        return ctx.mask(site.path, ~gone, values=left, reason=self._words())


def weight_of(site: Site) -> Tensor:
    """Return the weight of a site as it is used, zeros of an earlier mask included."""
    return cast(Tensor, site.module.weight).detach()


def zeros_of(site: Site) -> int:
    """Return how many weights of a site an earlier mask holds at zero."""
    return int((~kept_by(site.module)).sum())


def pattern_of(text: str) -> Pattern:
    """Return how many weights a pattern keeps, and of how many.

    Example:
        >>> pattern_of("2:4")
        (2, 4)
    """
    kept, of = text.split(":")
    return int(kept), int(of)
