"""Hints: what the unmodified model computes inside, as something for the compressed one to learn from.

Blocks that are removed leave a hole between two places whose contents are known: the compressed model is to hand on,
where the hole ends, what the original handed on there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimpoint.signature import flatten

Recorded = dict[str, Tensor]


@contextmanager
def recording(model: nn.Module, paths: Sequence[str]) -> Iterator[Recorded]:
    """Record the main output of modules, path → tensor, while the model runs inside.

    Args:
        model: that has the modules.
        paths: of modules; those that it does not have are passed over.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    recorded: Recorded = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = next((leaf for leaf in flatten(output) if isinstance(leaf, Tensor)), None)
            if first is not None:
                recorded[path] = first

        return hook

    handles = [modules[path].register_forward_hook(keep(path)) for path in paths if path in modules]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def hint_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor | None:
    """Return how far the student's inner outputs are from the teacher's, relative to the teacher's variance.

    Mean, over places, of the mean squared error divided by the (population) variance of the teacher's output. Where
    the student hands one tensor on through several places, because what stood between them was removed, the last place
    counts. Places whose shapes differ are passed over.

    Args:
        student: path → output, in the order of execution.
        teacher: path → output.

    Returns:
        A scalar, or `None` where no place can be compared.

    References:
        Romero et al., "FitNets: hints for thin deep nets" (2015); Jiao et al., "TinyBERT" (2020), for transformer
        layers matched to the last of the layers that they stand for.
    """
    last = {id(tensor): path for path, tensor in student.items()}
    # Norms, since they are vectorised and parallel in any memory layout: `mse_loss` and `var` take twice as long here.
    norm = torch.linalg.vector_norm
    parts = [
        (norm(student[path].float() - goal) / norm(goal - goal.mean()).clamp_min(1e-12)).square()
        for path in last.values()
        if path in teacher and (goal := teacher[path].float()).shape == student[path].shape
    ]
    return torch.stack(parts).mean() if parts else None
