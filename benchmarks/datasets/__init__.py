"""Real data as tasks with fixed roles: `mnist()`, `cifar10()`, `fsdd(speaker)`.

Each returns `Roles`: four disjoint `TensorDataset`s, the same ones always. `certify` is the official test set (the
speaker left out, for FSDD); the other three come from the training data, each class shared out evenly.

The archives lie in the directory that the environment variable `TRIMPOINT_DATA` names; nothing is downloaded.
"""

from benchmarks.datasets.images import cifar10, crop_and_flip, mnist
from benchmarks.datasets.roles import Roles
from benchmarks.datasets.speech import SPEAKERS, fsdd, vary_speech

__all__ = ["SPEAKERS", "Roles", "cifar10", "crop_and_flip", "fsdd", "mnist", "vary_speech"]
