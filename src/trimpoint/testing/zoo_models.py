"""Small, awkward architectures: each has one habit that breaks compression tools.

They are as small as they can be while a method still finds something to do: channels are multiples of eight.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def plain_cnn(channels: int = 16, classes: int = 4) -> nn.Sequential:
    """Build two convolutions and a head for `[batch, 3, 8, 8]`."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


class Separable(nn.Module):
    """Use depthwise, pointwise and grouped convolutions: `[batch, 3, 8, 8]` to `[batch, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu6(self.depthwise_norm(self.depthwise(x)))
        x = F.relu(self.grouped(F.relu(self.pointwise(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Shared(nn.Module):
    """Call one module twice and register it under two names: `[batch, 16]` to `[batch, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(16, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.again = self.body
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify rows of numbers."""
        return self.head(self.again(self.body(F.relu(self.inlet(x)))))  # type: ignore[no-any-return]


class TiedLanguageModel(nn.Module):
    """Tie the output projection to the embedding: tokens `[batch, 6]` to logits `[batch, 6, 32]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.hidden = nn.Linear(16, 32)
        self.back = nn.Linear(32, 16)
        self.decoder = nn.Linear(16, 32, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict a token for each position."""
        return self.decoder(self.back(F.gelu(self.hidden(self.embedding(tokens)))))  # type: ignore[no-any-return]


class DictOutputs(nn.Module):
    """Return a dict that holds a tensor and a tuple: `[batch, 3, 8, 8]` in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.hidden = nn.Linear(16, 24)
        self.head = nn.Linear(24, 4)
        self.aux = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Return logits `[batch, 4]` and auxiliary outputs."""
        features = F.relu(self.conv(x)).mean((2, 3))
        hidden = F.relu(self.hidden(features))
        return {"logits": self.head(hidden), "more": (self.aux(hidden), features.sum(1))}


class EncoderLayer(nn.Module):
    """Transform `[batch, length, width]` by attention and a feed-forward network, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mix positions; `mask` is `[batch, 1, 1, length]`, true where there is a token."""
        batch, length, _ = x.shape
        projections = (self.query, self.key, self.value)
        query, key, value = (part(x).view(batch, length, self.heads, -1).transpose(1, 2) for part in projections)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return what comes in, plus what the two sublayers add."""
        x = x + self.attend(self.norm1(x), mask)
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class MaskedTransformer(nn.Module):
    """Classify token sequences of varying length from named inputs."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(240, 16), nn.Embedding(16, 16)
        self.layers = nn.ModuleList(EncoderLayer(16, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokens and mask, both `[batch, length]`, to logits `[batch, 4]`."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(places)
        mask = attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        weight = attention_mask[..., None].to(x.dtype)
        pooled = (self.norm(x) * weight).sum(1) / weight.sum(1)
        return self.head(pooled)  # type: ignore[no-any-return]


class TiedTransformer(nn.Module):
    """Tie the output projection of a causal transformer to its embedding: `[batch, 6]` to logits `[batch, 6, 32]`."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(32, 16), nn.Embedding(16, 16)
        self.layers = nn.ModuleList(EncoderLayer(16, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(16)
        self.decoder = nn.Linear(16, 32, bias=False)
        self.decoder.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict a token for each position from those up to it."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        past = (places[:, None] >= places[None])[None, None]
        x = self.tokens(tokens) + self.positions(places)
        for layer in self.layers:
            x = layer(x, past)
        return self.decoder(self.norm(x))  # type: ignore[no-any-return]


class DetectorCore(nn.Module):
    """Map images `[batch, 3, 16, 16]` to a grid `[batch, 5, 4, 4]`: one confidence and four numbers of a box."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the grid."""
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))))  # type: ignore[no-any-return]


class Detector(nn.Module):
    """Return a list of boxes per image, or the loss where targets are given."""

    def __init__(self) -> None:
        super().__init__()
        self.core = DetectorCore()

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | list[Tensor]:
        """Return boxes, one `[k, 5]` per image, or the loss against boxes `[batch, 4]`."""
        grid = self.core(images)
        if targets is None:
            return decode_boxes(grid)
        cells = grid.flatten(2)
        share = cells[:, 0].softmax(-1)
        boxes = (cells[:, 1:] * share[:, None]).sum(-1)
        return F.smooth_l1_loss(boxes, targets)


def decode_boxes(grid: Tensor) -> list[Tensor]:
    """Return the three most confident cells of each image's grid as `[3, 5]`."""
    cells = grid.flatten(2).transpose(1, 2)
    return [image[image[:, 0].topk(3).indices] for image in cells]


class AttentionClassifier(nn.Module):
    """Use `nn.MultiheadAttention`, whose projections are bare parameters: `[batch, 5, 16]` to `[batch, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences."""
        x = self.inlet(x)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head((x + mixed).mean(1))  # type: ignore[no-any-return]


class LstmClassifier(nn.Module):
    """Read `[batch, 6, 8]` with an LSTM and classify its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences."""
        states, _ = self.lstm(x)
        return self.head(F.relu(self.hidden(states[:, -1])))  # type: ignore[no-any-return]


class GruStack(nn.Module):
    """Read `[batch, 6, 8]` with two GRU layers, time first, and classify the final states of both: `[batch, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 16, num_layers=2)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences."""
        _, final = self.gru(x.transpose(0, 1))
        return self.head(torch.tanh(torch.cat([final[0], final[1]], 1)))  # type: ignore[no-any-return]


class BidirectionalLstm(nn.Module):
    """Add two LSTM layers of both directions to a projection of their input: `[batch, 6, 8]` to `[batch, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 32)
        self.lstm = nn.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences."""
        states, _ = self.lstm(x)
        return self.head((states + self.project(x)).mean(1))  # type: ignore[no-any-return]


class NoParameters(nn.Module):
    """Classify by the mean colour: nothing to learn and nothing to compress."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, 4, 8, 8]` to `[batch, 4]`."""
        return F.relu(x).mean((2, 3))


class DenseNet(nn.Module):
    """Hand all earlier features on by concatenation: `[batch, 3, 8, 8]` to `[batch, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(19, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(35)
        self.conv3 = nn.Conv2d(35, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = torch.cat([x, F.relu(self.conv1(x))], 1)
        x = torch.cat([x, F.relu(self.conv2(x))], 1)
        return self.head(F.relu(self.conv3(self.norm(x))).mean((2, 3)))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Go down and up again with a skip connection: `[batch, 3, 8, 8]` to `[batch, 1, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, padding=1)
        self.bottom = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Predict a number for each pixel."""
        skip = F.relu(self.down(x))
        low = F.relu(self.up(F.relu(self.bottom(skip))))
        return self.out(torch.cat([skip, low], 1))  # type: ignore[no-any-return]


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Deal the channels of `[batch, channels, *size]` out: the first one of each group, then the second ones."""
    batch, channels, *size = x.shape
    return x.view(batch, groups, channels // groups, *size).transpose(1, 2).reshape(batch, channels, *size)


class SplitUnit(nn.Module):
    """Pass one half of the channels by a depthwise branch for the other, and shuffle both: a unit of ShuffleNet V2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.norm1 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)
        self.depthwise = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(half)
        self.conv2, self.norm2 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Return as many channels as come in."""
        kept, x = x.chunk(2, 1)
        x = self.depthwise_norm(self.depthwise(F.relu(self.norm1(self.conv1(x)))))
        return shuffle_channels(torch.cat([kept, F.relu(self.norm2(self.conv2(x)))], 1), 2)


class GroupedUnit(nn.Module):
    """Shuffle between two grouped convolutions whose result is added to the input: a unit of ShuffleNet V1."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.conv1, self.norm1 = nn.Conv2d(width, width, 1, groups=groups, bias=False), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 1, groups=groups, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return as many channels as come in."""
        inner = shuffle_channels(F.relu(self.norm1(self.conv1(x))), self.groups)
        return F.relu(x + self.norm2(self.conv2(self.depthwise(inner))))


class ShuffleNet(nn.Module):
    """Shuffle channels between groups: `[batch, 3, 8, 8]` to `[batch, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.split, self.grouped = SplitUnit(16), GroupedUnit(16, 4)
        self.last = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = self.grouped(self.split(F.relu(self.stem(x))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))  # type: ignore[no-any-return]


class SingleChannel(nn.Module):
    """Have no width at all: `[batch, 1, 8, 8]` to `[batch, 2]` through layers of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 1, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        return self.head(torch.tanh(self.conv2(torch.tanh(self.conv1(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class Hollow(nn.Module):
    """Have layers without weights, as a width of zero leaves them: `[batch, 8]` to `[batch, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        with warnings.catch_warnings(action="ignore"):  # that there is nothing to draw
            self.unread, self.silent = nn.Linear(0, 16), nn.Linear(16, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Classify rows."""
        hidden = F.relu(self.first(x) + self.unread(x[:, :0]))
        return self.head(torch.cat([hidden, self.silent(hidden)], 1))  # type: ignore[no-any-return]


class TwoInputs(nn.Module):
    """Take two positional inputs of different type: numbers `[batch, 8]` and a category `[batch]`."""

    def __init__(self) -> None:
        super().__init__()
        self.category = nn.Embedding(10, 8)
        self.hidden = nn.Linear(16, 32)
        self.head = nn.Linear(32, 1)

    def forward(self, numbers: Tensor, category: Tensor) -> Tensor:
        """Return one number per sample, `[batch, 1]`."""
        return self.head(F.relu(self.hidden(torch.cat([numbers, self.category(category)], 1))))  # type: ignore[no-any-return]
