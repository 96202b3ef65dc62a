"""Train what is left to answer like the unmodified model."""

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from trimpoint.method import Bounds, Context, Stage, Traits, param
from trimpoint.recover.distill import Distillation
from trimpoint.recover.recipe import Recovery


@dataclass(frozen=True, kw_only=True)
class Distill(Recovery):
    """Train with the unmodified model as the teacher, mixed with the task's own loss.

    When it pays:
        After removing blocks or many channels: the teacher's probabilities say more about a sample than its label, and
        need no labels at all at `alpha` 1.
    What it costs:
        Training time as for fine-tuning, and a forward pass of the unmodified model for each sample. With `hints=0`, or
        where the model has no blocks, only for each sample of each view: what the teacher said is kept.
    Needs:
        `train` data. Without a loss only the teacher is learnt from. The compressed model's main output must have the
        shape of the original's.
    Leaves alone:
        What fine-tuning leaves alone: frozen parameters, parameters out of `where`, structure, number formats.

    References:
        Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015); Ba and Caruana, "Do deep nets
        really need to be deep?" (2014), for outputs that are no class logits; Beyer et al., "Knowledge distillation: a
        good teacher is patient and consistent" (2022), for teacher and student seeing the same augmented view; Romero
        et al., "FitNets: hints for thin deep nets" (2015), for hints.
    """

    temperature: float = param(2.0, doc="by which logits are divided before the softmax", bounds=Bounds(gt=0))
    alpha: float = param(0.9, doc="weight of the teacher; the task's own loss has the rest", bounds=Bounds(ge=0, le=1))
    views: int = param(
        8, doc="differently augmented epochs that are cycled through; 0 never repeats one", bounds=Bounds(ge=0)
    )
    match: str = param(
        "auto",
        doc="compare class probabilities or squared error; `auto` takes the former where targets are class indices",
        choices=("auto", "softmax", "mse"),
    )

    hints: float = param(
        30.0,
        doc="weight of the distance from what the original hands on between its blocks; 0 leaves it out, and lets the "
        "teacher's answers be kept",
        bounds=Bounds(ge=0),
    )

    sgd_lr: ClassVar[float] = 0.1
    traits: ClassVar[Traits] = Traits(stage=Stage.RECOVER, acts_on="model", needs=frozenset({"train"}))

    def apply(self, ctx: Context) -> None:
        """Train the model in place."""
        match = cast(Literal["auto", "softmax", "mse"], self.match)
        ctx.train(
            self,
            Distillation(
                temperature=self.temperature, alpha=self.alpha, views=self.views, match=match, hints=self.hints
            ),
        )
