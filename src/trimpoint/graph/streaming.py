"""Recurrent models that run chunk by chunk: the state of their layers becomes an input and an output."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from trimpoint.errors import DataError, ModelError
from trimpoint.losses import call, explained
from trimpoint.signature import flatten, structure_of, unflatten

State = dict[str, Tensor]
_TOLERANCE = 1e-4


def streaming(model: nn.Module, example: Any, *, dim: int = 1) -> "Streaming":
    """Return a copy of a recurrent model that takes and returns its state, to be run chunk by chunk.

    `copy(inputs)` is what the model computes. `copy(inputs, state)` goes on from a state and returns `(outputs, state)`
    (by keywords: `copy(**inputs, state=state)`). A state has for each `nn.LSTM` the entries `<path>.h` and `<path>.c`,
    for each `nn.GRU` and `nn.RNN` `<path>.h`, each `[batch, layers, hidden]`, batch first as everything a task holds;
    so the inputs of the exported graph are called, and its outputs `<path>.h_out`. Paths of modules, and so filters
    and formats, are those of the model. What removes hidden units changes the state: do that before.

    Args:
        model: with at least one recurrent layer; it is not changed.
        example: its inputs (tensor, tuple or mapping), with at least two steps.
        dim: of the steps in inputs and outputs; with 0, the batch is dimension 1.

    Raises:
        ModelError: if there is no recurrent layer, one is bidirectional, one gets its state from the model, the answers
            are not finite, or those for two chunks are not those for the whole sequence: the model looks ahead, or over
            all steps.

    Example:
        >>> class Tagger(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         return self.head(self.lstm(x)[0])
        >>> x = torch.randn(1, 6, 4)
        >>> core = streaming(Tagger().eval(), x)
        >>> first, state = core(x[:, :4], core.initial_state())
        >>> second, state = core(x[:, 4:], state)
        >>> torch.allclose(torch.cat([first, second], 1), core(x), atol=1e-6)
        True
    """
    if isinstance(model, nn.RNNBase):
        raise ModelError("The model is itself a recurrent layer.", "make a module that has it, and returns its output")
    result = copy.deepcopy(model)
    if not isinstance(model, Streaming):
        result.__class__ = type(f"Streaming{type(model).__name__}", (Streaming, type(model)), {})
    made = cast(Streaming, result)
    if not list(made.recurrent_layers()):
        raise ModelError("The model has no `nn.LSTM`, `nn.GRU` or `nn.RNN` whose state could be carried.")
    for path, layer in made.recurrent_layers():
        if layer.bidirectional:
            raise ModelError(f"The layer {path!r} is bidirectional: it has to see the end of a sequence first.")
    _check(made, example, dim)
    return made


class Streaming(nn.Module):
    """What `streaming` adds to the class of a model."""

    def forward(self, *inputs: Any, state: Mapping[str, Tensor] | None = None, **named: Any) -> Any:
        """Run the model on whole sequences, or from a state: the last of several inputs, a mapping."""
        if state is None and len(inputs) > 1 and isinstance(inputs[-1], Mapping):
            *inputs, state = inputs  # type: ignore[assignment]
        if state is None:
            self._check_inputs(inputs, named)
            return super().forward(*inputs, **named)
        after: State = {}
        self._check_state(state)
        handles = []
        for path, layer in self.recurrent_layers():
            handles.append(layer.register_forward_pre_hook(_enter(path, state), with_kwargs=True))
            handles.append(layer.register_forward_hook(_leave(path, after)))
        try:
            outputs = super().forward(*inputs, **named)
        finally:
            for handle in handles:
                handle.remove()
        if missing := [name for name in state if name not in after]:
            raise ModelError(f"The model did not run the layer of {missing[0]!r}, whose state is to be carried.")
        return outputs, {name: after[name] for name in state}

    def recurrent_layers(self) -> Iterator[tuple[str, nn.RNNBase]]:
        """Yield the paths and layers that have a state."""
        found = set()
        for path, module in self.named_modules():
            # While `torch.export` traces, each path of a module has its own stand-in; they share what it holds.
            if isinstance(module, nn.RNNBase) and id(vars(module)) not in found:
                found.add(id(vars(module)))
                yield path, module

    def initial_state(self, batch: int = 1) -> State:
        """Return the state before the first step: zeros, as for whole sequences."""
        state = {}
        for path, layer in self.recurrent_layers():
            weight = next(layer.parameters())
            for name in ("h", "c") if isinstance(layer, nn.LSTM) else ("h",):
                size = layer.proj_size if name == "h" and layer.proj_size else layer.hidden_size
                state[f"{path}.{name}"] = weight.new_zeros(batch, layer.num_layers, size)
        return state

    def in_chunks(self, steps: int, *, dim: int = 1) -> "Chunks":
        """Return what runs whole sequences chunk by chunk: for `Task(predict=...)`.

        Args:
            steps: in a chunk, at least 1; the last one of a sequence may be shorter.
            dim: of the steps in inputs and outputs.
        """
        state = self.initial_state()
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in state.items()}
        return Chunks(steps=steps, shapes=shapes, dim=dim, dtype=next(iter(state.values())).dtype)

    def _check_inputs(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        try:
            inspect.signature(super().forward).bind(*inputs, **named)
        except TypeError as error:
            raise ModelError(
                f"The model does not take these inputs: {error}.",
                "a state is a mapping, as `initial_state(batch)` gives it; leave it out for whole sequences",
            ) from error

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        for name, wanted in self.initial_state().items():
            given = state.get(name)
            if not (
                isinstance(given, Tensor)
                and given.dtype == wanted.dtype
                and given.ndim == 3
                and given.shape[1:] == wanted.shape[1:]
            ):
                got = f"{list(given.shape)} {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
                raise ModelError(
                    f"The state {name!r} must be a tensor of shape [batch, {wanted.shape[1]}, {wanted.shape[2]}] and "
                    f"{wanted.dtype}. Got {got}.",
                    "remove hidden units before the model is made streaming; `initial_state()` gives the state",
                )


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Run whole sequences chunk by chunk, carrying the state: a task's `predict`.

    Args:
        steps: in a chunk.
        shapes: of each tensor of the state, without the batch.
        dim: of the steps in inputs and outputs.
        dtype: of the state.
    """

    steps: int
    shapes: Mapping[str, tuple[int, ...]]
    dim: int = 1
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ModelError(f"A chunk must have at least 1 step, a whole number. Got {self.steps}.")
        if self.dim < 0:
            raise ModelError(f"The dimension of the steps must be counted from the first one, 0. Got {self.dim}.")

    def __call__(self, run: Callable[[Any], Any], inputs: Any) -> Any:
        """Return the outputs for whole sequences, from `run((chunk, state))` one after another.

        Only inputs that have as many steps as the first one are cut; the others go into every call.
        """
        leaves, parts = flatten(inputs), []
        length = _steps(leaves, self.dim)
        if length == 0:
            raise DataError(f"A sequence must have at least 1 step, in dimension {self.dim}. Got none.")
        batch = leaves[0].shape[1 if self.dim == 0 else 0]
        state: Any = {name: leaves[0].new_zeros(batch, *shape, dtype=self.dtype) for name, shape in self.shapes.items()}
        for start in range(0, length, self.steps):
            cut = [
                leaf.narrow(self.dim, start, min(self.steps, length - start))
                if leaf.ndim > self.dim and leaf.shape[self.dim] == length
                else leaf
                for leaf in leaves
            ]
            outputs, state = run(_with_state(unflatten(structure_of(inputs), cut), state))
            parts.append(outputs)
        joined = [torch.cat(leaves, self.dim) for leaves in zip(*map(flatten, parts), strict=True)]
        return unflatten(structure_of(parts[0]), joined)


def _steps(leaves: Sequence[Tensor], dim: int) -> int:
    return leaves[0].shape[dim] if leaves and leaves[0].ndim > dim else 0


def _with_state(inputs: Any, state: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {**inputs, "state": state}
    return (*inputs, state) if isinstance(inputs, (tuple, list)) else (inputs, state)


def _enter(path: str, state: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Return a hook that hands a layer its state."""

    def hook(layer: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[1] if len(args) > 1 else kwargs.get("hx")
        if given is not None or isinstance(args[0], PackedSequence):
            how = "packed sequences" if given is None else "its initial state from the model"
            raise ModelError(f"The layer {path!r} gets {how}, so that no state can be handed to it.")
        names = ("h", "c") if isinstance(layer, nn.LSTM) else ("h",)
        for name in names:
            _check_batch(layer, args[0], f"{path}.{name}", state[f"{path}.{name}"])
        parts = tuple(state[f"{path}.{name}"].transpose(0, 1).contiguous() for name in names)
        return (args[0], parts if isinstance(layer, nn.LSTM) else parts[0]), {}

    return hook


def _check_batch(layer: nn.RNNBase, inputs: Tensor, name: str, state: Tensor) -> None:
    if inputs.ndim != 3:
        raise ModelError(f"The layer of the state {name!r} must read batches. Got a tensor of {list(inputs.shape)}.")
    batch = inputs.shape[0 if layer.batch_first else 1]
    if state.shape[0] != batch:
        raise ModelError(
            f"The state {name!r} must be of the batch of the inputs, {batch}. Got {state.shape[0]}.",
            "`initial_state(batch)` gives the state before the first step",
        )


def _leave(path: str, after: State) -> Callable[..., None]:
    """Return a hook that keeps the state that a layer ends with."""

    def hook(layer: nn.RNNBase, _: Any, output: Any) -> None:
        final = output[1] if isinstance(layer, nn.LSTM) else (output[1],)
        if f"{path}.h" in after:
            raise ModelError(f"The layer {path!r} is run more than once in a call: it has no single state.")
        for name, part in zip("hc", final, strict=False):
            after[f"{path}.{name}"] = part.transpose(0, 1)

    return hook


def _check(model: Streaming, example: Any, dim: int) -> None:
    """Check that chunks give the answers of whole sequences."""
    was = model.training
    leaves = flatten(example)
    steps = _steps(leaves, dim)
    if steps < 2:
        raise ModelError(f"The example must have at least 2 steps in dimension {dim}. Got {steps}.")
    model.eval()
    with torch.no_grad(), explained(example, "the example"):
        whole = call(model, example)
        chunks = model.in_chunks(-(-steps * 2 // 3), dim=dim)(lambda inputs: call(model, inputs), example)
    model.train(was)
    for one, other in zip(flatten(whole), flatten(chunks), strict=True):
        if not one.isfinite().all():
            raise ModelError("The answers for the example must be finite. They are not.", "give a sample of the data")
        if one.shape != other.shape or not torch.allclose(one, other, atol=_TOLERANCE * float(one.abs().max()) + 1e-12):
            raise ModelError(
                "The answers for two chunks must be those for the whole sequence. They are not.",
                "the model looks ahead or over all steps (a convolution, a mean over time): make the part that runs "
                "step by step streaming, and do the rest outside of it",
            )
