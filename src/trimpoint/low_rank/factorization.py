"""How large factors are and what an error counts: the hyper-parameters that all factorising methods share."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.utils import parametrize

from trimpoint.errors import DataError
from trimpoint.graph.layers import LowRank
from trimpoint.graph.masks import MASKED, masks_of
from trimpoint.low_rank.ranks import RULES, PairCost, RankRule
from trimpoint.method import Bounds, Context, Method, Site, param
from trimpoint.parts import Block, Group
from trimpoint.task import Task


@dataclass(frozen=True, kw_only=True)
class Factorization(Method):
    """A method that puts factors of low rank in the place of layers.

    Attributes:
        observed: what `weighting="auto"` is where there is calibration data.
    """

    observed: ClassVar[str] = "activation"

    rank_ratio: float = param(
        0.5,
        doc='share of the replaced parameters that the factors have, for rank="ratio"; 1 changes nothing',
        bounds=Bounds(gt=0, le=1),
        noop=1.0,
        weak=0.75,
        search=(0.75, 0.5, 0.35),
    )
    rank: str = param(
        "ratio",
        doc="how ranks are chosen: by the share of parameters, by the share of the (weighted) sum of squares that is "
        "kept (an error budget for each layer), or by variational Bayes",
        choices=RULES,
    )
    energy: float = param(
        0.95, doc='share of the (weighted) sum of squares that is kept, for rank="energy"', bounds=Bounds(gt=0, le=1)
    )
    round_to: int = param(
        1,
        doc="ranks are multiples of this, by ratio rounded down to one of them at least, by energy rounded up; 8 or 16 "
        "suit most kernels",
        bounds=Bounds(ge=1),
    )
    weighting: str = param(
        "auto",
        doc="what an error counts: all weights the same, by the layer's inputs, by the Fisher information of the loss, "
        "or by the inputs where there is `calibrate` data and all the same where not",
        choices=("auto", "none", "activation", "fisher"),
    )

    @property
    def rule(self) -> RankRule:
        """How ranks are chosen."""
        return RankRule(self.rank, self.rank_ratio, self.energy, self.round_to)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is to be replaced."""
        return self.rank == "ratio" and self.rank_ratio == 1

    @abstractmethod
    def unfit(self, model: nn.Module, site: Site) -> str:
        """Return why a layer cannot be replaced, or `""`."""

    @abstractmethod
    def saved(self, layer: nn.Module) -> int:
        """Return how many weights fewer the factors of a layer have by `rank="ratio"`; 0 where it stays.

        Where they save fewer multiplications than weights, as before a stride, it is those, per position of the output.
        """

    def saved_by_pair(self, cost: PairCost) -> int:
        """Return what `saved` returns of a pair of factors."""
        rank = self.rule.by_ratio(cost)
        return 0 if isinstance(rank, str) else cost.whole - rank * cost.size

    def sites(self, ctx: Context) -> list[Site]:
        """Return the layers in scope that can be replaced; the others are skipped with the reason."""
        found = []
        for site in ctx.modules():
            if reason := self.unfit(ctx.module, site) or ("rank_ratio=1 keeps all of it" if self.keeps_all else ""):
                ctx.skip(site.path, reason)
            else:
                found.append(site)
        return found

    def weighting_for(self, task: Task | None) -> str:
        """Return the weighting that is used with a task, never `"auto"`.

        Raises:
            DataError: if the task lacks what the weighting needs.
        """
        known = task is not None and task.has("calibrate")
        if self.weighting == "auto":
            return self.observed if known else "none"
        fisher = self.weighting == "fisher"
        if self.weighting != "none" and not (known and (not fisher or (task is not None and task.has("loss")))):
            needs, lacks = ("`calibrate` data and a loss", "one of them") if fisher else ("`calibrate` data", "it")
            raise DataError(
                f'weighting="{self.weighting}" needs {needs}. The task lacks {lacks}.',
                'give what is missing, or take weighting="none"',
            )
        return self.weighting

    def forecast(self, model: nn.Module, blocks: Sequence[Block], groups: Sequence[Group]) -> Mapping[str, float]:  # noqa: ARG002
        """Return the share that is left of each layer that is replaced: of parameters or multiplications, the larger.

        Nothing is said of ranks that are found in the weights and the data, by `rank="energy"` or `"bayes"`.
        """
        if self.rank != "ratio" or self.keeps_all:
            return {}
        saved = {
            site.path: self.saved(site.module) / sum(p.numel() for p in site.module.parameters())
            for site in _sites_in(model, self.traits.targets)
            if not self.unfit(model, site)
        }
        return {path: 1 - share for path, share in saved.items() if share > 0}


def _sites_in(model: nn.Module, targets: Sequence[str]) -> Iterator[Site]:
    """Yield the modules of some classes.

    Args:
        model: unmodified.
        targets: names of classes.
    """
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for path, module in model.named_modules():
        if set(targets) & {kind.__name__ for kind in type(module).__mro__}:
            tied = any(holders[id(p)] > 1 for p in module.parameters(recurse=False))
            yield Site(path=path, origin=path, module=module, tied=tied)


def irreplaceable(model: nn.Module, site: Site, plain: type[nn.Module] | None) -> str:
    """Return why a layer of any kind cannot be replaced by its factors, or `""`.

    Args:
        model: that the layer is part of, as it is now.
        site: the layer.
        plain: the class whose forward pass the factors stand for; `None` where that was looked at already.
    """
    parent = model.get_submodule(site.path.rpartition(".")[0])
    if site.path and isinstance(parent, LowRank):
        return "it is a factor of a layer already"
    if site.path and isinstance(parent, nn.MultiheadAttention):
        return "its weight is read by nn.MultiheadAttention, which does not call it"
    if site.tied:
        return "it shares its weight with another module"
    if masks_of(site.module):
        return MASKED.format(site.path)
    if parametrize.is_parametrized(site.module):
        return "its weight is computed from others (a parametrization)"
    if plain is not None and type(site.module).forward is not plain.forward:
        return f"its class {type(site.module).__name__} has a forward pass of its own"
    if any(value for name, value in vars(site.module).items() if name.endswith("_hooks") and isinstance(value, dict)):
        return "it has hooks, which would be lost"
    empty = any(not p.numel() for p in site.module.parameters(recurse=False))
    return "its weight is empty" if empty else ""
