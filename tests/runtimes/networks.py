"""Small networks with awkward interfaces, and what it takes to lower them."""

import torch
from torch import Tensor, nn

from trimpoint.demo.resnet import ResNet
from trimpoint.values import Format

BATCH = {0: "batch"}
OPEN = {0: "batch", 1: "length"}
WEIGHT = Format(dtype="int8", granularity="channel", reduce_range=True)
"""Of 7 bits: with 8, the sums of 16 bits on a processor without VNNI saturate."""
INPUT = Format(dtype="uint8", symmetric=False)


class Transformer(nn.Module):
    """A layer of attention over tokens, with a mask; it returns a mapping with an entry that is `None`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor | None]:
        x = self.layer(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.unsqueeze(-1).to(x.dtype)
        return {"logits": self.head((x * mask).sum(1) / mask.sum(1)), "loss": None, "hidden": x}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Pair(nn.Module):
    """Two inputs; nested outputs, one of them an input as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.a(x) + y, (self.b(x), y)


class FixedLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.position = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.position)


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * len([x[i] for i in range(x.shape[0])]) / x.shape[0]


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Mixed(nn.Module):
    """Convolutions with batch norms (one with a negative factor), grouped and transposed, and a product over tokens."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.tokens = nn.Linear(4, 6)
        self.head = nn.Linear(6, 5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([-2.0, 0.5, 1.0, -0.1, 3.0, 1.0, 0.7, -1.0]))
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.up(self.grouped(self.norm(self.conv(x)).relu()))
        return self.head(self.tokens(x.flatten(2).transpose(1, 2)).mean(1))


def convolutional() -> nn.Module:
    """Return a small convolutional network, trained for a moment so that its answers differ between inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(30):
        x, y = quadrants(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def quadrants(count: int) -> tuple[Tensor, Tensor]:
    """Return noisy 12×12 images with stripes of one of four widths, and which."""
    y = torch.randint(0, 4, (count,))
    columns = torch.arange(12).expand(count, 12)
    stripes = ((columns // (y + 1)[:, None]) % 2).float()
    return stripes[:, None, None, :].expand(count, 1, 12, 12) + 0.2 * torch.randn(count, 1, 12, 12), y


def random_resnet() -> nn.Module:
    """Return a ResNet-8 with random weights and with batch statistics as different as trained ones."""
    torch.manual_seed(0)
    net = ResNet(depth=1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval()


def tokens(count: int = 4, length: int = 7) -> dict[str, Tensor]:
    mask = torch.ones(count, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"attention_mask": mask, "input_ids": torch.randint(0, 50, (count, length))}


def int8(module: nn.Module) -> dict[str, dict[str, Format]]:
    """Return int8 formats for all convolutions and linear layers."""
    kinds = (nn.Conv2d, nn.Linear)
    return {
        name: {"weight": WEIGHT, "input": INPUT} for name, part in module.named_modules() if isinstance(part, kinds)
    }
