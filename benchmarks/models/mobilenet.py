"""MobileNet: a stack of depthwise-separable convolutions."""

from collections import OrderedDict

from torch import Tensor, nn

LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Channels out at width 1, and stride, of each depthwise-separable layer."""


def _unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            norm=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(),
        )
    )


class MobileNet(nn.Module):
    """Classify images by thirteen depthwise-separable convolutions.

    Args:
        width: multiplies the number of channels of every layer.
        classes: of the output.

    References:
        Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision applications" (2017),
        table 1.
    """

    def __init__(self, width: float = 0.5, classes: int = 10) -> None:
        super().__init__()
        inputs = round(32 * width)
        self.stem = _unit(3, inputs, 3, 2)
        layers = []
        for channels, stride in LAYERS:
            outputs = round(channels * width)
            layers.append(
                nn.Sequential(
                    OrderedDict(
                        depthwise=_unit(inputs, inputs, 3, stride, inputs), pointwise=_unit(inputs, outputs, 1, 1)
                    )
                )
            )
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 3, height, width]` to logits `[batch, classes]`."""
        return self.head(self.flatten(self.pool(self.layers(self.stem(x)))))  # type: ignore[no-any-return]
