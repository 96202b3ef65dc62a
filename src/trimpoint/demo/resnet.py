"""ResNet-20 for small images, the network of the demo.

Widths 16/32/64 and three basic blocks a stage, as in section 4.2 of He et al., "Deep Residual Learning for Image
Recognition" (2015), with 1×1 projections where the shape changes.
"""

from collections import OrderedDict

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Add two 3×3 convolutions to their input.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and of the projection.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                OrderedDict(conv=nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm=nn.BatchNorm2d(outputs))
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, inputs, height, width]` to `[batch, outputs, height / stride, width / stride]`."""
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A stack of basic blocks in stages, each stage after the first halving height and width.

    Args:
        widths: channels of each stage.
        depth: blocks in each stage.
        channels: of the image.
        classes: of the output.
    """

    def __init__(
        self, widths: tuple[int, ...] = (16, 32, 64), depth: int = 3, channels: int = 1, classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), norm=nn.BatchNorm2d(widths[0]), relu=nn.ReLU()
            )
        )
        stages = []
        inputs = widths[0]
        for index, width in enumerate(widths):
            blocks = []
            for block in range(depth):
                blocks.append(BasicBlock(inputs, width, 2 if index > 0 and block == 0 else 1))
                inputs = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, channels, height, width]` to logits `[batch, classes]`."""
        return self.head(self.flatten(self.pool(self.stages(self.stem(x)))))  # type: ignore[no-any-return]


def resnet20(channels: int = 1, classes: int = 10) -> ResNet:
    """Build an untrained ResNet-20: nine blocks, about 275,000 parameters."""
    return ResNet(channels=channels, classes=classes)
