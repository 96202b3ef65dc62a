"""Train a model in place: constant learning rate, then a cool-down that a longer run can branch off again.

The schedule is warm-up, stable, decay (Hägele et al., "Scaling laws and compute-optimal training beyond fixed training
durations", 2024): a longer run repeats a shorter one exactly up to the shorter one's cool-down. The state at that point
is kept, so that the longer run starts there instead of at the beginning.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimpoint.errors import DataError, TrainingError
from trimpoint.recover.checkpoint import fingerprint, load_state, save_state
from trimpoint.recover.layout import channels_last_, prepare, restore_layout_, suits_channels_last
from trimpoint.recover.penalty import Penalty

Progress = Callable[[float, str], None]
_SNAPSHOT_EVERY = 50
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train, as plain numbers.

    Args:
        steps: optimizer steps, one batch each.
        lr: learning rate while it is constant.
        optimizer: SGD with Nesterov momentum, or AdamW.
        weight_decay: on weights; norms and biases are spared.
        momentum: of SGD.
        warmup: steps of linear increase at the start.
        cooldown: share of `steps` in the final linear decrease to zero.
        precision: of the forward pass; parameters stay float32.
        clip: largest norm of the gradient; 0 does not clip.
        seed: of dropout and everything else that is random in the model.
    """

    steps: int
    lr: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    momentum: float = 0.9
    warmup: int = 0
    cooldown: float = 0.3
    precision: Literal["float32", "bfloat16"] = "float32"
    clip: float = 0.0
    seed: int = 0

    @property
    def stable(self) -> int:
        """Steps before the cool-down: where the state is kept."""
        return self.steps - round(self.cooldown * self.steps)

    def factor(self, step: int) -> float:
        """Return the share of `lr` at a step, counted from 0."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        return rise * min(1.0, (self.steps - step) / (self.steps - self.stable + 1))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run did.

    Args:
        steps: its length, the resumed part included.
        resumed: step at which it went on from a kept state; 0 from the beginning.
        first_loss: of its first step here.
        last_loss: mean of its last steps (a twentieth of all, at least one).
    """

    steps: int
    resumed: int
    first_loss: float
    last_loss: float


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Any], Tensor],
    batches: Callable[[int], Iterator[Any]],
    settings: Settings,
    *,
    state: Path | None = None,
    progress: Progress | None = None,
    penalty: Penalty | None = None,
) -> Trained:
    """Train `model` in place; the same arguments give the same bytes on one machine and number of threads.

    Parameters that do not require a gradient are not trained, and norms all of whose parameters are frozen keep their
    statistics. Training mode and memory layout of every module are afterwards what they were.

    Args:
        model: to be trained.
        loss_of: `(model, batch) -> scalar loss`.
        batches: epoch number → that epoch's batches, the same ones each time it is asked.
        settings: how to train.
        state: file in which the state before the cool-down is kept, and from which a longer run goes on. A state of
            other settings, another model or a later step is not used.
        progress: called with the finished share and a short text.
        penalty: added to the loss.

    Raises:
        TrainingError: if nothing can be trained, or the loss or its gradient is not finite; the model then holds the
            last weights that were good.
        DataError: if an epoch has no batch.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError(
            "The model has no trainable parameter.", "set `requires_grad` on what should be trained, or widen `where`"
        )
    modes = {module: module.training for module in model.modules()}
    layout = channels_last_(model)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(settings.seed)
            _set_training(model)
            return _Run(model, loss_of, batches, settings, penalty).run(state, progress)
    finally:
        restore_layout_(layout)
        for module, mode in modes.items():
            module.training = mode
        model.zero_grad(set_to_none=True)


class _Run:
    """The moving parts of one training run."""

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[nn.Module, Any], Tensor],
        batches: Callable[[int], Iterator[Any]],
        settings: Settings,
        penalty: Penalty | None = None,
    ) -> None:
        self.model, self.loss_of, self.batches, self.settings = model, loss_of, batches, settings
        self.penalty = penalty
        self.optimizer = make_optimizer(model, settings)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.channels_last = suits_channels_last(model)
        self.step, self.epoch, self.index = 0, 0, 0
        self.losses: list[float] = []

    def run(self, state: Path | None, progress: Progress | None) -> Trained:
        """Train to the end, from the kept state where there is a fitting one."""
        settings = self.settings
        key = "" if self.penalty is None else self.penalty.key
        mark = "" if state is None else fingerprint(self.model, settings, key)
        kept = None if state is None else load_state(state, mark, settings.stable, self.model, self.optimizer)
        self.step, self.epoch, self.index = kept or (0, 0, 0)
        resumed = self.step
        stream = self._stream()
        every = max(1, settings.steps // 200)
        good = _snapshot(self.model)
        while self.step < settings.steps:
            if (self.step - resumed) % _SNAPSHOT_EVERY == 0:
                good = _snapshot(self.model)
            self.losses.append(self._advance(next(stream), good))
            self.step += 1
            if state is not None and self.step == settings.stable:
                save_state(state, mark, self.model, self.optimizer, (self.step, self.epoch, self.index))
            if progress is not None and (self.step % every == 0 or self.step == settings.steps):
                progress(self.step / settings.steps, f"loss {_tail(self.losses):.4g}")
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.trained):
            _restore(self.model, good)
            raise TrainingError(
                "The last step of the training made a weight that is not finite; earlier weights were restored.",
                f"lower the learning rate (it was {settings.lr:g})",
            )
        first, last = (self.losses[0], _tail(self.losses)) if self.losses else (math.nan, math.nan)
        return Trained(steps=settings.steps, resumed=resumed, first_loss=first, last_loss=last)

    def _stream(self) -> Iterator[Any]:
        """Yield batches without end, from `epoch` and `index` on, and keep count of both."""
        skip = self.index
        while True:
            empty = True
            for index, batch in enumerate(self.batches(self.epoch), 1):
                empty = False
                if index > skip:
                    self.index = index
                    yield prepare(batch, self.trained[0].device, self.channels_last)
            if empty:
                raise DataError(
                    f"Epoch {self.epoch} of the training data has no batch.", "the loader is empty, or was used up"
                )
            self.epoch, self.index, skip = self.epoch + 1, 0, 0

    def _advance(self, batch: Any, good: dict[str, Tensor]) -> float:
        """Take one optimizer step and return its loss."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * settings.factor(self.step)
        with torch.autocast(self.trained[0].device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            loss = self.loss_of(self.model, batch)
        _check_loss(loss)
        if self.penalty is not None:
            loss = loss + self.penalty.of(self.model, self.step)
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
            if bool(torch.isfinite(norm)):
                if settings.clip and float(norm) > settings.clip:
                    nn.utils.clip_grads_with_norm_(self.trained, settings.clip, norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                return value
        where = first_not_finite(self.model, self.loss_of, batch)
        _restore(self.model, good)
        raise TrainingError(
            f"Training broke down at step {self.step + 1} of {settings.steps}: "
            + (f"the loss was {value:g}" if not math.isfinite(value) else "the gradient was not finite")
            + f"; {where}. The weights of up to {_SNAPSHOT_EVERY} steps before were restored.",
            f"lower the learning rate (it was {settings.lr:g}), clip the gradient, or check the data",
        )


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return the optimizer over the trainable parameters; norms and biases have no weight decay."""
    decayed: dict[int, Tensor] = {}
    spared: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in decayed and id(parameter) not in spared:
                spare = isinstance(module, _NORMS) or "bias" in name or parameter.ndim < 2
                (spared if spare else decayed)[id(parameter)] = parameter
    groups = [
        {"params": list(decayed.values()), "weight_decay": settings.weight_decay},
        {"params": list(spared.values()), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


def first_not_finite(model: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor], batch: Any) -> str:
    """Run the batch again and return in words which module is the first whose output is not finite."""
    found: list[str] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(path)

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in model.named_modules()]
    try:
        with torch.no_grad():
            loss_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not _finite(batch):
        return "the batch itself has a value that is not finite"
    if not found:
        return "every module's output was finite, so the loss function or its gradient is the cause"
    return f"the first module whose output was not finite is `{found[0] or 'the model itself'}`"


def _set_training(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _NORMS) and own and not any(p.requires_grad for p in own):
            module.eval()


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TrainingError(f"The loss must be a scalar tensor. Got {got}.", "return its mean over the batch")
    if not loss.requires_grad:
        raise TrainingError(
            "The loss does not depend on any trainable parameter.", "compute it from the model's outputs, undetached"
        )


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(_finite(item) for item in value.values())
    return all(_finite(item) for item in value) if isinstance(value, (tuple, list)) else True


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@torch.no_grad()
def _restore(model: nn.Module, good: dict[str, Tensor]) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.copy_(good[name])


def _tail(losses: list[float]) -> float:
    last = losses[-max(1, len(losses) // 20) :]
    return sum(last) / len(last)
