"""ResNet-8, the image classifier of MLPerf Tiny."""

from collections import OrderedDict

from torch import Tensor, nn


class Stack(nn.Module):
    """Add two 3×3 convolutions to their input, which a 1×1 convolution projects where the shape changes.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and of the projection.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, inputs, height, width]` to `[batch, outputs, height / stride, width / stride]`."""
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet8(nn.Module):
    """Classify images of 32 × 32 pixels by three stacks of 16, 32 and 64 filters.

    78,186 parameters; with the running means and variances 78,666 numbers, which is what Keras counts of the reference.
    As there, the convolutions have biases and the projections no normalisation; strided convolutions pad both sides
    alike, where Keras pads below and to the right.

    Args:
        classes: of the output.

    References:
        Banbury et al., "MLPerf Tiny Benchmark" (2021), section 4.1.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(3, 16, 3, 1, 1), norm=nn.BatchNorm2d(16), relu=nn.ReLU()),
        )
        self.stacks = nn.Sequential(Stack(16, 16, 1), Stack(16, 32, 2), Stack(32, 64, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 3, 32, 32]` to logits `[batch, classes]`."""
        return self.head(self.flatten(self.pool(self.stacks(self.stem(x)))))  # type: ignore[no-any-return]
