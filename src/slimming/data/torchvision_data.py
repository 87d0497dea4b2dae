"""The data sets that torchvision downloads and verifies by checksums."""

from collections.abc import Sequence

import torch
from torchvision import datasets

from slimming.data.base import ImageData, check_labels
from slimming.errors import DataError


class TorchvisionData(ImageData):
    """A torchvision data set; `source` is its class, `files` what must lie below `root`."""

    source: type
    files: str

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs,
    ):
        """Check the values; nothing is read yet.

        Args:
            mean, std: per channel, in [0, 1], to normalise by; None: those of the training images.
        """
        super().__init__(**kwargs)
        self.root, self.download = root, download
        self.normalise_by(mean, std)

    def prepare_data(self) -> None:
        """Download what is missing (on one process per node).

        Raises:
            DataError: not there and not to be had.
        """
        for train in (True, False):
            self._dataset(train, self.download)

    def load(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        dataset = self._dataset(train, download=False)
        images = torch.as_tensor(dataset.data)
        labels = torch.as_tensor(getattr(dataset, "targets", getattr(dataset, "labels", None))).long()
        if images.ndim == 3:  # MNIST: (N, H, W)
            images = images[:, None]
        elif images.shape[-1] == 3:  # CIFAR: (N, H, W, C)
            images = images.permute(0, 3, 1, 2)
        check_labels(f"{self.root}/{self.files}", labels, self.num_classes)
        return images.contiguous(), labels

    def _dataset(self, train: bool, download: bool):
        part = {"split": "train" if train else "test"} if self.source is datasets.SVHN else {"train": train}
        try:
            return self.source(self.root, **part)
        except ImportError as error:
            raise DataError(f"data={self.source.__name__.lower()} needs scipy: pip install 'slimming[svhn]'") from error
        except Exception as error:  # missing, half there or damaged: unpickling a broken file can raise anything
            if not download:
                raise self._missing(error) from error
        try:
            return self.source(self.root, download=True, **part)
        except Exception as error:
            raise self._missing(error) from error

    def _missing(self, error: Exception) -> DataError:
        name = self.source.__name__
        reason = " ".join(str(error).split()) or type(error).__name__
        return DataError(
            f"{name} is not complete in data.root={self.root} and could not be "
            f"{'downloaded' if self.download else 'loaded (data.download=false)'}: {reason}. "
            f"Put the official files there as {self.root}/{self.files} (a damaged one removed first) or set data.root; "
            "data=digits needs no download"
        )


class CIFAR10(TorchvisionData):
    """50,000 + 10,000 colour images of 32x32 pixels, 10 classes."""

    source, files = datasets.CIFAR10, "cifar-10-batches-py/"
    num_classes, in_channels, image_size, flips = 10, 3, 32, True
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class CIFAR100(TorchvisionData):
    """50,000 + 10,000 colour images of 32x32 pixels, 100 classes."""

    source, files = datasets.CIFAR100, "cifar-100-python/"
    num_classes, in_channels, image_size, flips = 100, 3, 32, True
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class SVHN(TorchvisionData):
    """73,257 + 26,032 colour images of house numbers, 32x32 pixels, 10 classes; mirrored digits are other digits."""

    source, files = datasets.SVHN, "{train,test}_32x32.mat"
    num_classes, in_channels, image_size, flips = 10, 3, 32, False
    mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)


class MNIST(TorchvisionData):
    """60,000 + 10,000 grey images of 28x28 pixels, 10 classes; mirrored digits are other digits."""

    source, files = datasets.MNIST, "MNIST/raw/*-ubyte"
    num_classes, in_channels, image_size, flips = 10, 1, 28, False
    mean, std = (0.1307,), (0.3081,)
