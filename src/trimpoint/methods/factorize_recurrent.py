"""Replace the input weights of LSTM and GRU layers by two thinner matrices."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimpoint.graph.layers import LowRankRecurrent
from trimpoint.low_rank import PairCost
from trimpoint.low_rank.factorization import Factorization, irreplaceable
from trimpoint.low_rank.fit import Fit, fitted, weights_of
from trimpoint.method import Context, Fact, Site, Stage, Traits

_ARGUMENTS = ("hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")


@dataclass(frozen=True, kw_only=True)
class FactorizeRecurrent(Factorization):
    """Replace what an LSTM or GRU reads by fewer numbers: a thin linear layer in front, a narrower layer behind it.

    The input weights of all gates, of both directions, are one matrix; its factors are the linear layer and the input
    weights of the recurrent layer, which stays one operator of the runtime. How the matrix is approximated is as for a
    linear layer: by the inputs that occur, by the Fisher information of the loss, or plainly.

    When it pays:
        For the size of the file, where the input is wide against the hidden state: word vectors, spectra, features of
        a network before it. It makes little faster: the input weights are multiplied for all time steps at once, and
        it is the state's weights, step after step, that take the time. Removing hidden units is worth more there.
    What it costs:
        Quality falls with the rank; plan a recovery step behind it.
    Needs:
        `calibrate` data for `weighting="activation"` (which `"auto"` takes where there is such data); for `"fisher"`
        also a loss.
    Leaves alone:
        The state's weights: their factors would have to stand inside the recurrence, where the LSTM and GRU operators
        of ONNX have no place for them (they know no projection), and an unrolled loop would be slower than what it
        replaces. The input weights of later layers, which stand inside the operator too. Layers with `proj_size`, and
        those whose factors would have no fewer parameters.

    References:
        Prabhavalkar et al., "On the compression of recurrent neural networks with an application to LVCSR acoustic
        modeling for embedded speech recognition" (2016); Wang et al., "SVD-LLM: truncation-aware singular value
        decomposition for large language model compression" (2024), for the weighting by the inputs.
    """

    traits: ClassVar[Traits] = Traits(
        stage=Stage.FACTORIZE,
        targets=("LSTM", "GRU"),
        requires=Fact.FLOAT_WEIGHT | Fact.DENSE,
        removes=Fact.ORIGINAL_SHAPE,
        reduces=frozenset({"params"}),
        status="experimental",
    )

    def apply(self, ctx: Context) -> None:
        """Replace every recurrent layer in scope that becomes smaller."""
        if not (sites := self.sites(ctx)):
            return
        sizes = {site.path: int(_input_weights(site.module)[0].shape[1]) for site in sites}
        weights = weights_of(self, ctx, sizes, dict.fromkeys(sizes, _gradient))
        for site in sites:
            layer: Any = site.module
            matrix = torch.cat([weight.detach() for weight in _input_weights(layer)])
            fit = fitted(matrix, site.path, weights, self.rule, bias=layer.bias)
            if isinstance(fit, str):
                ctx.skip(site.path, fit)
            else:
                ctx.replace(site.path, _narrower(layer, fit), fit.note)

    def unfit(self, model: nn.Module, site: Site) -> str:
        """Return why a layer cannot be replaced, or `""`."""
        layer: Any = site.module
        if site.path and isinstance(model.get_submodule(site.path.rpartition(".")[0]), LowRankRecurrent):
            return "its input weights are factors already"
        if reason := irreplaceable(model, site, nn.LSTM if isinstance(layer, nn.LSTM) else nn.GRU):
            return reason
        return "it projects its state, which no runtime here can run" if layer.proj_size else ""

    def saved(self, layer: nn.Module) -> int:
        """Return how many parameters fewer a layer has behind its first factor by `rank="ratio"`."""
        weights = _input_weights(layer)
        rows, size = sum(len(weight) for weight in weights), weights[0].shape[1]
        return self.saved_by_pair(PairCost(rows * size, rows + size, min(rows, size)))


def _input_weights(layer: Any) -> list[nn.Parameter]:
    """Return the input weights of the first layer, `[gates · hidden, in]`, one for each direction."""
    return [getattr(layer, f"weight_ih_l0{end}") for end in _directions(layer)]


def _directions(layer: Any) -> tuple[str, ...]:
    return ("", "_reverse") if layer.bidirectional else ("",)


def _gradient(layer: nn.Module) -> Tensor:
    """Return the gradient of the input weights, `[directions · gates · hidden, in]`; zero where there is none."""
    return torch.cat([w.grad if w.grad is not None else torch.zeros_like(w) for w in _input_weights(layer)])


def _narrower(layer: Any, fit: Fit) -> LowRankRecurrent:
    """Return the layer behind its first factor, with the second as input weights."""
    arguments = {name: getattr(layer, name) for name in _ARGUMENTS}
    like = layer.weight_ih_l0
    made = LowRankRecurrent(layer.mode, layer.input_size, fit.rank, **arguments, device="meta")
    made = made.to_empty(device=like.device).to(like.dtype)
    old, new = dict(layer.named_parameters()), dict(made.recurrent.named_parameters())
    with torch.no_grad():
        made.reduce.weight.copy_(fit.first)
        for name, parameter in new.items():
            if name in old and old[name].shape == parameter.shape:
                parameter.copy_(old[name])
        parts = zip(_directions(layer), fit.second.chunk(len(_directions(layer))), strict=True)
        shifts = fit.shift.chunk(len(_directions(layer)))
        for (end, weight), shift in zip(parts, shifts, strict=True):
            new[f"weight_ih_l0{end}"].copy_(weight)
            if layer.bias:
                new[f"bias_ih_l0{end}"].copy_(old[f"bias_ih_l0{end}"].double() + shift)
    for name, parameter in new.items():
        parameter.requires_grad_(old[name].requires_grad)
    made.reduce.weight.requires_grad_(like.requires_grad)
    return made
