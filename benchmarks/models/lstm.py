"""A sequence classifier: two LSTM layers, the mean over time, one linear layer."""

from torch import Tensor, nn


class LstmClassifier(nn.Module):
    """Classify sequences of feature vectors.

    Args:
        features: of each step.
        hidden: units of each layer.
        layers: stacked.
        classes: of the output.
        dropout: before the last layer, while training.

    References:
        Hochreiter and Schmidhuber, "Long short-term memory" (1997).
    """

    def __init__(
        self, features: int = 40, hidden: int = 256, layers: int = 2, classes: int = 10, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, steps, features]` to logits `[batch, classes]`."""
        states, _ = self.lstm(x)
        return self.head(self.dropout(states.mean(1)))  # type: ignore[no-any-return]
