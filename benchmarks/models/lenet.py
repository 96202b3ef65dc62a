"""LeNet-300-100: three linear layers."""

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
