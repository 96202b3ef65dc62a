"""Small networks, each with one thing that makes pruning its structure hard, and inputs for them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Flat(nn.Module):
    """A convolution flattened into a linear layer: one channel is many inputs."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.fc1 = nn.Linear(4 * 4 * 4, 10)
        self.fc2 = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        return self.fc2(F.relu(self.fc1(self.conv2(y).flatten(1))))


class Depthwise(nn.Module):
    """An inverted residual with a depthwise convolution, then one with a channel multiplier of two."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.block = InvertedResidual(8, 16)
        self.twice = nn.Conv2d(8, 16, 3, groups=8)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.block(self.stem(x))).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depth(self.expand(x)))


class Shuffle(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.last = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(F.relu(self.first(x)))
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(F.relu(self.last(y)).mean((2, 3)))


class Gated(nn.Module):
    """Group norm, squeeze-and-excitation, and a gate made by splitting channels in two."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.norm = nn.GroupNorm(4, 8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.both = nn.Conv2d(8, 12, 1)
        self.last = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.norm(self.first(x)), 2)
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        value, gate = self.both(y).chunk(2, 1)
        return self.head(self.last(value * torch.sigmoid(gate)).flatten(1))


class Dense(nn.Module):
    """Concatenated features, read again and again."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 4, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.cat([y, self.conv1(F.relu(self.norm1(y)))], 1)
        y = torch.cat([y, self.conv2(F.relu(self.norm2(y)))], 1)
        return self.head(F.relu(self.norm3(y)).amax((2, 3)))


class UNet(nn.Module):
    """A skip connection around a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, 2, 1)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.merge = nn.Conv2d(14, 7, 3, padding=1)
        self.leave = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.enter(x))
        up = self.up(F.relu(self.down(skip)))
        return self.leave(F.relu(self.merge(torch.cat([up, skip], 1))))


class Recurrent(nn.Module):
    """An LSTM between an embedding and linear layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.lstm(self.embedding(tokens))[0][:, -1])))


class Tied(nn.Module):
    """An embedding whose weight is also the last layer's, positions and a scale as plain parameters."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.embedding(tokens) + self.positions
        return self.head(y + self.scale * self.down(F.relu(self.up(y))))


class Tokens(nn.Module):
    """Patches with a class token and positions, as in a vision transformer without its attention."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.positions
        return self.head((y + self.down(F.relu(self.up(y))))[:, 0])


class Shared(nn.Module):
    """One convolution, called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.again = self.conv
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(self.stem(x))))
        return self.head(F.relu(self.norm(self.again(y))).mean((-1, -2)))


class Layer(nn.Module):
    """A pre-norm transformer layer, written by hand."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.out(y)
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Layer(8, 2, 12) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.embedding(tokens)
        for layer in self.layers:
            y = layer(y)
        return self.head(y[:, 0])


class Single(nn.Module):
    """Single-head attention by plain products: queries and keys go in pairs."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 10)
        self.out = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) / 3.0, -1)
        return self.out(weights @ self.value(x))


class Mixer(nn.Module):
    """Linear layers over positions, between linear layers over channels."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.tokens1, self.tokens2 = nn.Linear(5, 7, bias=False), nn.Linear(7, 5, bias=False)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        y = y + self.tokens2(F.relu(self.tokens1(y.transpose(1, 2)))).transpose(1, 2)
        y = y + self.down(F.relu(self.up(y)))
        return self.head(y.mean(1))


class Fixed(nn.Module):
    """Sizes written into the code, which tracing cannot see."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc1 = nn.Linear(4 * 64, 8)
        self.fc2 = nn.Linear(8, 6)
        self.fc3 = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fc1(self.conv(x).view(-1, 256)))
        z = self.fc2(y)
        return self.fc3(z[:, :3] + z[:, 3:])


IMAGE, TOKENS, SEQUENCE = (2, 3, 8, 8), (2, 5), (2, 5, 6)
NETWORKS = {
    kind.__name__: (kind, shape)
    for kind, shape in [
        (Flat, IMAGE),
        (Depthwise, IMAGE),
        (Shuffle, IMAGE),
        (Gated, IMAGE),
        (Dense, IMAGE),
        (UNet, IMAGE),
        (Recurrent, TOKENS),
        (Tied, TOKENS),
        (Tokens, IMAGE),
        (Shared, IMAGE),
        (Transformer, TOKENS),
        (Single, SEQUENCE),
        (Mixer, SEQUENCE),
    ]
}


def inputs_of(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if len(shape) == 2:
        return torch.randint(0, 20, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with norms that are not the identity, in evaluation mode, and inputs for it."""
    kind, shape = NETWORKS[name]
    return settle(kind()), inputs_of(shape)


def settle(module: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for part in module.modules():
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if "norm" in type(part).__name__.lower() and tensor.is_floating_point():
                torch.nn.init.uniform_(tensor, 0.5 if name != "bias" else -0.5, 1.5)
    return module.eval()
