"""How long and how recovery trains: the hyper-parameters that all recovery methods share."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from trimpoint.errors import DataError
from trimpoint.method import Bounds, Method, param
from trimpoint.recover.trainer import Settings
from trimpoint.task import Task

_WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 0.01}
_ATTENTION = (nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.Embedding)


@dataclass(frozen=True, kw_only=True)
class Recovery(Method):
    """A method that trains: its length and its optimizer."""

    sgd_lr: ClassVar[float] = 0.05

    epochs: float = param(
        2.0, doc="passes over the training data at full effort", bounds=Bounds(ge=0), noop=0.0, search=(0.5, 1, 2, 4)
    )
    optimizer: str = param(
        "auto",
        doc="`sgd` (Nesterov) where the model has batch norms, else `adamw`",
        choices=("auto", "sgd", "adamw"),
    )
    lr: float | None = param(
        None,
        doc="learning rate while it is constant; by default 0.05 for sgd (0.1 to distil), for adamw 1e-4 with "
        "attention, else 1e-3",
        bounds=Bounds(gt=0),
    )
    weight_decay: float | None = param(
        None, doc="on weights, not on norms and biases; by default 5e-4 for sgd, 0.01 for adamw", bounds=Bounds(ge=0)
    )
    momentum: float = param(0.9, doc="of sgd", bounds=Bounds(ge=0, lt=1))
    warmup: float = param(0.1, doc="epochs of linear increase of the learning rate", bounds=Bounds(ge=0))
    cooldown: float = param(
        0.4, doc="share of the run in the final linear decrease of the learning rate", bounds=Bounds(ge=0, le=1)
    )
    clip: float = param(1.0, doc="largest norm of the gradient; 0 does not clip", bounds=Bounds(ge=0))
    precision: str = param(
        "float32", doc="of the forward pass; parameters stay float32", choices=("float32", "bfloat16")
    )

    def settings(self, model: nn.Module, task: Task, *, effort: float = 1.0, seed: int = 0) -> Settings:
        """Return the plain numbers for a model and its task.

        Args:
            model: decides what `auto` means.
            task: how many steps an epoch has.
            effort: share of the full length.
            seed: of the run.
        """
        steps = steps_in_epoch(task)
        optimizer: Literal["sgd", "adamw"] = "sgd"
        if self.optimizer == "adamw" or (self.optimizer == "auto" and prefers_adamw(model)):
            optimizer = "adamw"
        return Settings(
            steps=max(1, round(self.epochs * effort * steps)) if self.epochs else 0,
            lr=_default_lr(model, optimizer, self.sgd_lr) if self.lr is None else self.lr,
            optimizer=optimizer,
            weight_decay=_WEIGHT_DECAY[optimizer] if self.weight_decay is None else self.weight_decay,
            momentum=self.momentum,
            warmup=round(self.warmup * steps),
            cooldown=self.cooldown,
            precision="bfloat16" if self.precision == "bfloat16" else "float32",
            clip=self.clip,
            seed=seed,
        )


def short_settings(model: nn.Module, steps: int, *, seed: int = 0) -> Settings:
    """Return the defaults for `steps` steps of training, without warm-up, by which candidates are compared."""
    optimizer: Literal["sgd", "adamw"] = "adamw" if prefers_adamw(model) else "sgd"
    return Settings(
        steps=steps,
        lr=_default_lr(model, optimizer, Recovery.sgd_lr),
        optimizer=optimizer,
        weight_decay=_WEIGHT_DECAY[optimizer],
        clip=1.0,
        seed=seed,
    )


def _default_lr(model: nn.Module, optimizer: str, sgd_lr: float) -> float:
    return sgd_lr if optimizer == "sgd" else 1e-4 if _has(model, _ATTENTION) else 1e-3


def prefers_adamw(model: nn.Module) -> bool:
    """Return whether a model has no batch norms: without them, a large learning rate soon breaks down."""
    return not _has(model, (nn.modules.batchnorm._BatchNorm,))


def _has(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(module, kinds) for module in model.modules())


def steps_in_epoch(task: Task) -> int:
    """Return how many batches `Task.training_batches` yields in an epoch.

    Raises:
        DataError: if there is no training data.
    """
    count = len(task.data("train"))
    return count // min(task.batch_size, count)


def check_batches(model: nn.Module, task: Task) -> None:
    """Check that batch norms get more than one sample at a time.

    Raises:
        DataError: if they would not.
    """
    size = min(task.batch_size, len(task.data("train")))
    if size == 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise DataError(
            "A model with batch norms cannot be trained on batches of one sample.",
            "raise `Task(batch_size=...)`, or give more training data",
        )
