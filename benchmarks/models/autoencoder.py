"""The fully connected autoencoder of MLPerf Tiny."""

from torch import Tensor, nn

HIDDEN = (128, 128, 128, 128, 8, 128, 128, 128, 128)


class Autoencoder(nn.Module):
    """Reconstruct frames of log-mel energies through eight numbers; 269,992 numbers with running means and variances.

    Args:
        features: of a frame, or of several in a row.

    References:
        Banbury et al., "MLPerf Tiny Benchmark" (2021), section 4.1; the baseline of DCASE 2020, task 2.
    """

    def __init__(self, features: int = 640) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = features
        for width in HIDDEN:
            layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, features))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, features]` to its reconstruction, of the same shape."""
        return self.layers(x)  # type: ignore[no-any-return]
