"""LightningDataModules that keep whole data sets in memory as uint8 and augment on the device."""

from slimming.data.base import ImageData
from slimming.data.boxes import Boxes
from slimming.data.detection import DetectionData
from slimming.data.digits import Digits
from slimming.data.image_folder import ImageFolder
from slimming.data.imagenet import ImageNet
from slimming.data.scenes import Scenes
from slimming.data.torchvision_data import CIFAR10, CIFAR100, MNIST, SVHN

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "SVHN",
    "Boxes",
    "DetectionData",
    "Digits",
    "ImageData",
    "ImageFolder",
    "ImageNet",
    "Scenes",
]
