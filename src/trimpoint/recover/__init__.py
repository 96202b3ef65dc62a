"""Training after surgery: the trainer, its recipe, and learning from the unmodified model."""

from trimpoint.recover.distill import Distillation, Teacher, distillation_loss
from trimpoint.recover.recipe import Recovery, steps_in_epoch
from trimpoint.recover.trainer import Settings, Trained, train

__all__ = [
    "Distillation",
    "Recovery",
    "Settings",
    "Teacher",
    "Trained",
    "distillation_loss",
    "steps_in_epoch",
    "train",
]
