"""Object detection on one's own images: YOLO-format folders and COCO JSON."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from slimming.data import coco, yolo
from slimming.data.box_lists import BoxList
from slimming.data.detection import DetectionData, Source
from slimming.data.image_files import open_image
from slimming.errors import ConfigError, DataError, check_number

TEST_SIZE = 0.2  # of a folder that has no part to test on


def letterbox(
    image: Image.Image, boxes: torch.Tensor, size: int, fill: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit an image into a square, its aspect ratio kept, bars of colour `fill` on both sides of it.

    Args:
        boxes: (n, 4) corners as shares of the image's width and height.

    Returns:
        (3, size, size) uint8, and corners (n, 4) in its pixels.
    """
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as T

    w, h = image.size
    scale = size / max(w, h)
    height, width = max(1, round(h * scale)), max(1, round(w * scale))
    left, top = (size - width) // 2, (size - height) // 2
    bars = [left, top, size - width - left, size - height - top]
    pixels = tv_tensors.BoundingBoxes(boxes * torch.tensor([w, h, w, h]), format="XYXY", canvas_size=(h, w))
    pixels = T.pad(T.resize(pixels, [height, width]), bars)
    image = T.pad(T.resize(T.to_image(image), [height, width], antialias=True), bars, fill=list(fill))
    return image.as_subclass(torch.Tensor), pixels.as_subclass(torch.Tensor)


class FileBoxes:
    """Images that are opened when they are asked for, with their boxes."""

    def __init__(self, listed: BoxList, size: int, fill: Sequence[int]):
        self.listed, self.size, self.fill = listed, size, fill

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        boxes, labels = self.listed.of(index)
        return *letterbox(open_image(self.listed.path(index), upright=True), boxes, self.size, self.fill), labels


class Boxes(DetectionData):
    """Colour images with boxes from a YOLO-format folder, or as COCO JSON lists them; letterboxed to a square.

    All labels are read and checked when the data are set up; images are decoded in `num_workers` processes. Where there
    is a validation part and no test part, the validation part is the test set: nothing is selected on it.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 416,
        classes: Sequence[str] | None = None,
        annotations: Mapping[str, str | None] | None = None,
        test_size: float | None = None,
        flips: bool = True,
        jitter: float = 0.3,
        num_workers: int | None = None,
        **kwargs,
    ):
        """Find the images and the names of the classes.

        Args:
            classes: their names; None: those of data.yaml, classes.txt or COCO's categories.
            annotations: COCO files by part (train, val, test), relative to root; None: a YOLO-format folder.
            test_size: images held out as the test set where there is neither a test nor a validation part: a share or a
                number; None: a fifth.
            num_workers: decoding processes of every rank; None: one per CPU core that this rank has.

        Raises:
            DataError: a folder or an annotation file is missing or damaged.
        """
        super().__init__(image_size=image_size, flips=flips, jitter=jitter, **kwargs)
        if num_workers is not None:
            check_number("data.num_workers", num_workers, 0, whole=True)
        if root is None or not Path(root).is_dir():
            raise DataError(
                f"data.root must name a folder of images with boxes, got {root}; the layout is {yolo.LAYOUT}"
            )
        self.root, self.num_workers = Path(root), num_workers
        self.annotations = {part: self.root / file for part, file in (annotations or {}).items() if file}
        parts = self._coco(classes) if self.annotations else self._yolo(classes)
        self.num_classes = len(self.class_names)
        self._set_test_size(test_size, parts)

    def _coco(self, classes: Sequence[str] | None) -> list[str]:
        if classes is not None:
            raise ConfigError("data.classes is for YOLO-format folders: COCO's categories name the classes")
        if "train" not in self.annotations or set(self.annotations) - {*yolo.PARTS}:
            raise ConfigError(
                f"data.annotations must name the files of train, and of val or test; got {', '.join(self.annotations)}"
            )
        self.read = {part: coco.read_json(file) for part, file in self.annotations.items()}
        names = {part: coco.categories(self.annotations[part], content) for part, content in self.read.items()}
        for part, own in names.items():
            if own != names["train"]:
                raise DataError(
                    f"{self.annotations[part]} must have the categories of {self.annotations['train']}, "
                    f"{list(names['train'].items())[:5]} ...; got {list(own.items())[:5]} ..."
                )
        self.class_names = list(names["train"].values())
        return list(self.read)

    def _yolo(self, classes: Sequence[str] | None) -> list[str]:
        names = list(classes) if classes is not None else yolo.class_names(self.root)
        if not names or len(set(names)) < len(names):
            raise DataError(
                f"data.root={self.root}: the names of the classes are needed, each one once: data.classes=[cat,dog], "
                f"`names` in data.yaml, or classes.txt with one a line; got {names}"
            )
        self.class_names = names
        self.images = yolo.find_images(self.root)
        return list(self.images)

    def _set_test_size(self, size: float | None, parts: Sequence[str]) -> None:
        if len(parts) == 1:
            self.test_size = TEST_SIZE if size is None else size
            check_number("data.test_size", self.test_size, 0, above=True)
        elif size is not None:
            raise ConfigError(f"data.test_size={size} and the parts {', '.join(parts)} of the data exclude each other")

    def sources(self) -> dict[str, Source]:
        if self.annotations:
            found = {
                part: coco.read_boxes(self.annotations[part], content, self.root, part)
                for part, content in self.read.items()
            }
            self.read = {}  # a large one takes gigabytes
        else:
            yolo.check_no_label_is_left(image for files in self.images.values() for image in files)
            found = {part: yolo.read_boxes(self.root, files, self.num_classes) for part, files in self.images.items()}
        if "test" not in found and "val" in found:
            found["test"] = found.pop("val")
        return {part: FileBoxes(listed, self.image_size, self.fill()) for part, listed in found.items()}

    def workers(self) -> int:
        world = self.trainer.world_size if self.trainer else 1
        return max(1, (os.cpu_count() or 1) // world) if self.num_workers is None else self.num_workers
