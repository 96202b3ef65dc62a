"""Train so that the units that are not needed fade, and can be removed afterwards at little loss."""

from dataclasses import dataclass
from typing import ClassVar

from trimpoint.method import Bounds, Context, Stage, Traits, param
from trimpoint.recover.gates import gate_lasso, gated
from trimpoint.recover.penalty import group_lasso, scale_lasso, scales
from trimpoint.recover.recipe import Recovery, steps_in_epoch

_STRENGTH = {"groups": 0.001, "scales": 0.02, "gates": 0.02}
_WHICH = {
    "scales": " that runs through a batch norm",
    "gates": " that linear layers or convolutions read, all of them trained,",
}
_GATE_STEP = 0.01
"""By how much a step of AdamW changes a gate at most, whatever the learning rate of the weights."""


@dataclass(frozen=True, kw_only=True)
class SparseTrain(Recovery):
    """Train with the task's own loss and a penalty that lets whole units fade.

    When it pays:
        Before channels, heads or hidden units are removed by the size of their weights, where little or no training
        can follow: what goes had become small already. A recovery behind the removal makes up for most of what this
        saves. By itself it makes nothing smaller or faster: units become small, with gates some of them zero.
    What it costs:
        Training time, as for fine-tuning, and a few sums over the weights for each step. Quality, where the strength is
        too large: all units fade then, and a recovery has further to go.
    Needs:
        `train` data and a loss; coupled groups that can be removed; for `penalty="scales"` batch norms; for
        `penalty="gates"` units that linear layers and convolutions read, not those of recurrent layers.
    Leaves alone:
        Structure and number formats, parameters that do not require a gradient, parameters out of the step's `where`;
        weights that belong to no removable group are trained without the penalty.

    References:
        Wen et al., "Learning structured sparsity in deep neural networks" (2016), for the group lasso; Fang et al.,
        "DepGraph: towards any structural pruning" (2023), for taking all coupled parameters of a unit together; Liu et
        al., "Learning efficient convolutional networks through network slimming" (2017), for the scales; Huang and
        Wang, "Data-driven sparse structure selection for deep neural networks" (2018), for the gates; Wang et al.,
        "Neural pruning via growing regularization" (2021), for a penalty that grows.
    """

    penalty: str = param(
        "groups",
        doc="the L2 norm of all weights of a unit together, times the root of their number; the L1 norm of the scales "
        "of batch norms; or the L1 norm of a gate for each unit, which is learned with the weights and can close",
        choices=("groups", "scales", "gates"),
    )
    strength: float | None = param(
        None,
        doc="factor of the penalty in the loss; by default 0.001 for groups, 0.02 for scales and for gates",
        bounds=Bounds(ge=0),
    )
    rise: float = param(1.0, doc="epochs in which the strength rises linearly from zero", bounds=Bounds(ge=0))

    traits: ClassVar[Traits] = Traits(
        stage=Stage.RECOVER, acts_on="model", needs=frozenset({"train", "loss"}), status="experimental"
    )

    def apply(self, ctx: Context) -> None:
        """Train the model in place."""
        task, groups = ctx.task, ctx.groups()
        if self.penalty == "scales":
            groups = tuple(group for group in groups if scales(ctx.module, group))
        elif self.penalty == "gates":
            groups = gated(ctx.module, groups, ctx.covers)
        if not groups or task is None:
            there = _WHICH.get(self.penalty, "")
            return ctx.skip("", f"no group in scope{there} can be removed, so that nothing is to fade")
        rise = round(self.rise * steps_in_epoch(task))
        strength = _STRENGTH[self.penalty] if self.strength is None else self.strength
        if self.penalty != "gates":
            lasso = scale_lasso if self.penalty == "scales" else group_lasso
            return ctx.train(self, penalty=lasso(groups, strength, rise))
        settings = self.settings(ctx.module, task)
        pace = _GATE_STEP / settings.lr if settings.optimizer == "adamw" else 1.0
        inputs = task.example_batch(2)
        return ctx.train(self, penalty=gate_lasso(groups, strength, rise, pace=pace, inputs=inputs))
