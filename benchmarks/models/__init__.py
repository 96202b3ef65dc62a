"""The networks of the benchmarks that are not ResNets (those are `trimpoint.demo.resnet`)."""

from benchmarks.models.autoencoder import Autoencoder
from benchmarks.models.lenet import LeNet5, LeNet300
from benchmarks.models.lstm import LstmClassifier
from benchmarks.models.mobilenet import MobileNet
from benchmarks.models.resnet8 import ResNet8

__all__ = ["Autoencoder", "LeNet5", "LeNet300", "LstmClassifier", "MobileNet", "ResNet8"]
