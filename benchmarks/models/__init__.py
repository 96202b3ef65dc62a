"""The networks of the benchmarks that are not ResNets (those are `trimpoint.demo.resnet`)."""

from benchmarks.models.lenet import LeNet5, LeNet300
from benchmarks.models.lstm import LstmClassifier
from benchmarks.models.mobilenet import MobileNet

__all__ = ["LeNet5", "LeNet300", "LstmClassifier", "MobileNet"]
