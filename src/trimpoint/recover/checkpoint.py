"""The state of a training run in one file: tensors as safetensors, everything else as JSON in its header."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimpoint.errors import StorageError

if TYPE_CHECKING:
    from trimpoint.recover.trainer import Settings

_FORMAT = 1


def weights_digest(model: nn.Module) -> str:
    """Return a hash of names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return digest.hexdigest()


def fingerprint(model: nn.Module, settings: "Settings", penalty: str = "") -> str:
    """Return what a state belongs to: first weights, what is trained, settings before the cool-down, the penalty."""
    fixed = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("steps", "cooldown")}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    more = [penalty] if penalty else []
    text = json.dumps([_FORMAT, torch.__version__, weights_digest(model), trained, fixed, *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_state(
    path: Path, mark: str, model: nn.Module, optimizer: torch.optim.Optimizer, position: tuple[int, int, int]
) -> None:
    """Write the state of a run: weights, buffers, optimizer, random numbers and position, all or nothing.

    Args:
        path: of the file; its directory is made.
        mark: what the state belongs to, from `fingerprint`.
        model: in the middle of its training.
        optimizer: of the model.
        position: step, epoch, and batch within the epoch.

    Raises:
        StorageError: if the file cannot be written; what was there before is then still there.
    """
    tensors = {f"model/{name}": tensor for name, tensor in _tensors(model).items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in _optimizer_tensors(model, optimizer).items()}
    tensors["random"] = torch.get_rng_state()
    header = {"trimpoint": json.dumps({"mark": mark, "position": position})}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, header)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)
        raise StorageError(f"The training state {path} could not be written: {error}.", "is the disk full?") from error


def load_state(
    path: Path, mark: str, latest: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, int, int] | None:
    """Put a kept state back, in place.

    Args:
        path: of the file.
        mark: what the state must belong to, from `fingerprint`.
        latest: the last step at which the state may stand.
        model: with the weights that the run began with.
        optimizer: of the model, new.

    Returns:
        Step, epoch, and batch within the epoch; `None`, and nothing changed, where there is no state that fits.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("trimpoint", "{}"))
            if header.get("mark") != mark or header["position"][0] > latest:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            tensor.copy_(tensors[f"model/{name}"])
    for name, parameter in model.named_parameters():
        prefix = f"optimizer/{name}/"
        for key, value in tensors.items():
            if key.startswith(prefix):
                like = parameter if value.shape == parameter.shape else value
                optimizer.state[parameter][key.removeprefix(prefix)] = torch.empty_like(like, dtype=value.dtype).copy_(
                    value
                )
    torch.set_rng_state(tensors["random"])
    step, epoch, index = header["position"]
    return step, epoch, index


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
