"""Train what is left with the task's own loss."""

from dataclasses import dataclass
from typing import ClassVar

from trimpoint.method import Context, Stage, Traits
from trimpoint.recover.recipe import Recovery


@dataclass(frozen=True, kw_only=True)
class Finetune(Recovery):
    """Train on the task's training data with the task's own loss.

    When it pays:
        After every change that costs quality, where there are labels and no unmodified model worth imitating: it was
        trained on other data, or is itself no good.
    What it costs:
        Training time: a forward and a backward pass of the compressed model for each sample and epoch.
    Needs:
        `train` data and a loss; a model with parameters that require a gradient.
    Leaves alone:
        Parameters that do not require a gradient, parameters out of the step's `where`, statistics of norms whose
        parameters are all frozen, structure and number formats.

    References:
        Hägele et al., "Scaling laws and compute-optimal training beyond fixed training durations" (2024), for the
        schedule; Renda, Frankle and Carbin, "Comparing rewinding and fine-tuning in neural network pruning" (2020), for
        a learning rate near the one of the first training.
    """

    traits: ClassVar[Traits] = Traits(
        stage=Stage.RECOVER, acts_on="model", needs=frozenset({"train", "loss"}), reduces=frozenset()
    )

    def apply(self, ctx: Context) -> None:
        """Train the model in place."""
        ctx.train(self)
