"""Networks of two LSTM layers: a classifier of sequences, and a language model."""

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


class LstmLanguageModel(nn.Module):
    """Tell of each word which one follows; one matrix holds the words that are read and those that are told.

    Args:
        words: in the vocabulary.
        width: of a word's vector.
        hidden: units of each layer.
        layers: stacked.
        dropout: on vectors and between layers, while training.

    References:
        Press and Wolf, "Using the output embedding to improve language models" (2017), for the shared matrix.
    """

    def __init__(self, words: int, width: int = 256, hidden: int = 448, layers: int = 2, dropout: float = 0.25) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.narrow = nn.Linear(hidden, width)
        self.head = nn.Linear(width, words)
        nn.init.uniform_(self.words.weight, -0.05, 0.05)
        nn.init.zeros_(self.head.bias)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        """Map indices `[batch, positions]` to logits `[batch, positions, words]`."""
        states, _ = self.lstm(self.dropout(self.words(words)))
        return self.head(self.dropout(self.narrow(states)))  # type: ignore[no-any-return]
