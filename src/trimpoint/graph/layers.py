"""Layers that can stand where another one was: a closed vocabulary, so that a file that names one imports nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations

from trimpoint.errors import SurgeryError
from trimpoint.graph.pruned_attention import PrunedAttention

_MOST = 1 << 31


class LowRank(nn.Sequential):
    """Thin layers in a row, in the place of one layer; what asks for the sizes or the weight of that one finds them.

    Example:
        >>> LowRank(nn.Linear(8, 2, bias=False), nn.Linear(2, 4)).weight.shape
        torch.Size([4, 8])
    """

    def __getattr__(self, name: str) -> Any:
        if name in ("in_features", "in_channels", "num_embeddings", "padding_idx"):
            return getattr(self[0], name)
        if name in ("out_features", "out_channels", "embedding_dim", "bias"):
            return getattr(self[-1], "out_features" if name == "embedding_dim" else name)
        if name in ("kernel_size", "stride", "dilation"):  # Along each dimension one part alone has more than 1.
            return tuple(max(sizes) for sizes in zip(*(getattr(part, name) for part in self), strict=True))
        if name == "padding":  # In words it is that of the parts with more than one position.
            paddings = [part.padding for part in self]
            words = [padding for padding in paddings if isinstance(padding, str)]
            return words[0] if words else tuple(map(sum, zip(*paddings, strict=True)))
        if name == "padding_mode":  # A part of one position pads nothing, with zeros.
            return next((part.padding_mode for part in self if part.padding_mode != "zeros"), "zeros")
        if name == "groups":
            return max(cast(int, part.groups) for part in self)
        if name == "weight":
            return self._composed()
        return super().__getattr__(name)

    def _composed(self) -> Tensor:
        """Return the weight of the layer that the parts are together."""
        product, *weights = [cast(Tensor, part.weight) for part in self]
        for weight in weights:
            if isinstance(self[0], nn.Embedding):
                product = product @ weight.T
            else:  # Kernels: along each dimension of space one of the two has size 1.
                product = torch.einsum("or...,ri...->oi...", weight, product)
        return product


class LowRankRecurrent(nn.Module):
    """An LSTM or GRU that reads fewer numbers, behind the layer that makes them: low-rank input weights.

    Args:
        mode: `"LSTM"` or `"GRU"`.
        input_size: of what goes in.
        rank: what the recurrent layer reads of it.
        hidden_size: of its state.
        num_layers: of the recurrent layer.
        bias: whether it has biases.
        batch_first: whether the batch is the first dimension.
        dropout: between its layers.
        bidirectional: whether it runs in both directions.
        device: of the weights.
    """

    def __init__(
        self,
        mode: str,
        input_size: int,
        rank: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.mode, self.input_size, self.rank, self.hidden_size = mode, input_size, rank, hidden_size
        self.num_layers, self.batch_first, self.dropout, self.bidirectional = (
            num_layers,
            batch_first,
            dropout,
            bidirectional,
        )
        self.bias = bias or None
        self.reduce = nn.Linear(input_size, rank, bias=False, device=device)
        kind = nn.LSTM if mode == "LSTM" else nn.GRU
        self.recurrent = kind(
            rank,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
        )

    def forward(self, inputs: Any, state: Any = None) -> Any:
        """Return what the recurrent layer returns; `inputs` may be a packed sequence."""
        if isinstance(inputs, nn.utils.rnn.PackedSequence):
            return self.recurrent(inputs._replace(data=self.reduce(inputs.data)), state)
        return self.recurrent(self.reduce(inputs), state)

    def flatten_parameters(self) -> None:
        """Do what the recurrent layer does."""
        self.recurrent.flatten_parameters()


class PrunedVocabulary(nn.Module):
    """An embedding that holds some of its rows; every other id reads one of them.

    Args:
        num_embeddings: number of ids, as before.
        embedding_dim: length of a row.
        rows: number of rows that are held.
        padding_row: the row that gets no gradient.
        device: of the weights.
    """

    remap: Tensor
    """`[num_embeddings]`: the row of each id."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rows: int, padding_row: int | None = None, device: Any = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rows, self.padding_row = (
            num_embeddings,
            embedding_dim,
            rows,
            padding_row,
        )
        self.table = nn.Embedding(rows, embedding_dim, padding_idx=padding_row, device=device)
        self.register_buffer("remap", torch.zeros(num_embeddings, dtype=torch.int32, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids`, `[..., embedding_dim]`."""
        rows = F.embedding(ids, self.remap[:, None]).squeeze(-1)  # Refuses ids out of range, unlike an index.
        return self.table(rows)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Show how many ids there are."""
        return f"{self.num_embeddings} ids"


@dataclass(frozen=True)
class _Kind:
    """A layer of the vocabulary: its class and the arguments that make it again, each an attribute of the layer."""

    type: type[nn.Module]
    arguments: tuple[str, ...]


_CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "bias",
    "padding_mode",
)
_KINDS: dict[str, _Kind] = {
    "linear": _Kind(nn.Linear, ("in_features", "out_features", "bias")),
    "conv1d": _Kind(nn.Conv1d, _CONVOLUTION),
    "conv2d": _Kind(nn.Conv2d, _CONVOLUTION),
    "conv3d": _Kind(nn.Conv3d, _CONVOLUTION),
    "embedding": _Kind(nn.Embedding, ("num_embeddings", "embedding_dim", "padding_idx")),
    "pruned_attention": _Kind(
        PrunedAttention,
        ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "bias", "dropout", "batch_first"),
    ),
    "low_rank_recurrent": _Kind(
        LowRankRecurrent,
        (
            "mode",
            "input_size",
            "rank",
            "hidden_size",
            "num_layers",
            "bias",
            "batch_first",
            "dropout",
            "bidirectional",
        ),
    ),
    "pruned_vocabulary": _Kind(PrunedVocabulary, ("num_embeddings", "embedding_dim", "rows", "padding_row")),
}
_LOW_RANK = "low_rank"


def layer_to_data(module: nn.Module) -> dict[str, Any]:
    """Return a layer of the vocabulary as JSON data, without its weights.

    Raises:
        SurgeryError: if the layer is of another class.

    Example:
        >>> layer_to_data(nn.Linear(8, 4, bias=False))
        {'layer': 'linear', 'in_features': 8, 'out_features': 4, 'bias': False}
    """
    own = type_before_parametrizations(module)
    if own is LowRank:
        return {"layer": _LOW_RANK, "parts": [layer_to_data(part) for part in cast(LowRank, module)]}
    for name, kind in _KINDS.items():
        if own is kind.type:
            values = {key: getattr(module, key) for key in kind.arguments}
            if "bias" in values:
                values["bias"] = values["bias"] is not None
            plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            return {"layer": name, **plain}
    raise SurgeryError(
        f"A {own.__name__} cannot stand in the place of a layer.",
        f"take one of {', '.join(kind.type.__name__ for kind in _KINDS.values())}, or a LowRank of them",
    )


def check_layer(data: Any) -> str:
    """Return what is wrong with the JSON form of a layer, or `""`."""
    if not isinstance(data, Mapping) or not isinstance(data.get("layer"), str):
        return f"a layer is a mapping with its name. Got {data!r}"
    if data["layer"] == _LOW_RANK:
        parts = data.get("parts")
        if set(data) != {"layer", "parts"} or not isinstance(parts, list) or not 1 <= len(parts) <= 8:
            return f"a low_rank layer has one to eight parts. Got {data!r}"
        if any(isinstance(part, Mapping) and part.get("layer") == _LOW_RANK for part in parts):
            return "a low_rank layer does not hold another"
        return next((problem for part in parts if (problem := check_layer(part))), "")
    if data["layer"] not in _KINDS:
        return f"the layers are {', '.join((*_KINDS, _LOW_RANK))}. Got {data['layer']!r}"
    if set(data) != {"layer", *_KINDS[data["layer"]].arguments}:
        return f"a {data['layer']} has {', '.join(_KINDS[data['layer']].arguments)}. Got {sorted(data)}"
    bad = [key for key, value in data.items() if key != "layer" and not _sound(key, value)]
    return f"{bad[0]!r} of a {data['layer']} must not be {data[bad[0]]!r}" if bad else ""


def _sound(key: str, value: Any) -> bool:
    if key == "mode":
        return value in ("LSTM", "GRU")
    if key in ("bias", "batch_first", "bidirectional"):
        return isinstance(value, bool)
    if key == "dropout":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    if key == "padding_mode":
        return value in ("zeros", "reflect", "replicate", "circular")
    if key in ("padding_idx", "padding_row") and value is None:
        return True
    if key == "padding" and value in ("same", "valid"):
        return True
    least = 0 if key in ("padding", "padding_idx", "padding_row") else 1
    if isinstance(value, list):
        return 1 <= len(value) <= 3 and all(_whole(item, least) for item in value)
    return _whole(value, least)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _MOST


def layer_from_data(data: Mapping[str, Any], like: nn.Module) -> nn.Module:
    """Make a layer from its JSON form; its weights are not initialised.

    Args:
        data: sound, see `check_layer`.
        like: the layer in whose place it will stand: device and type of the weights are taken from it.

    Raises:
        SurgeryError: if no such layer can be made.
    """
    old = next((p for p in like.parameters() if p.is_floating_point()), torch.empty(0))
    with torch.random.fork_rng(devices=[]):
        return _made(data).to_empty(device=old.device).to(old.dtype)


def _made(data: Mapping[str, Any]) -> nn.Module:
    if data["layer"] == _LOW_RANK:
        return LowRank(*(_made(part) for part in cast(Sequence[Any], data["parts"])))
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key != "layer"}
    try:
        return _KINDS[data["layer"]].type(**values, device="meta")
    except (RuntimeError, TypeError, ValueError) as error:
        raise SurgeryError(f"The layer {dict(data)!r} cannot be made: {error}") from error
