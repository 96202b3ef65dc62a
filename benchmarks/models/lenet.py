"""LeNet-300-100, three linear layers, and LeNet-5 in the layout that the literature on compression has it in."""

from torch import Tensor, nn


class LeNet300(nn.Module):
    """Classify 28 × 28 images by hidden layers of 300 and 100 units; 266,610 parameters.

    Args:
        classes: of the output.

    References:
        LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition" (1998), where it
        is called 28×28–300–100–10; with ReLU, as the literature on pruning has it since Han et al. (2015).
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(784, 300)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(300, 100)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(100, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 1, 28, 28]` to logits `[batch, classes]`."""
        x = self.relu1(self.fc1(self.flatten(x)))
        return self.fc3(self.relu2(self.fc2(x)))  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """Classify 28 × 28 images by two convolutions and two linear layers; 431,080 parameters.

    The layout is that of Caffe's example, to which the figures of Han et al. (2015, 2016) and all after them refer: 20
    and 50 filters of 5 × 5, each followed by pooling and by nothing else, 500 hidden units with ReLU.

    Args:
        classes: of the output.

    References:
        Jia et al., "Caffe: convolutional architecture for fast feature embedding" (2014), `lenet_train_test.prototxt`.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(800, 500)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 1, 28, 28]` to logits `[batch, classes]`."""
        x = self.pool2(self.conv2(self.pool1(self.conv1(x))))
        return self.fc2(self.relu1(self.fc1(self.flatten(x))))  # type: ignore[no-any-return]
