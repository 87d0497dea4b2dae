"""Generated scenes for trying out object detection: a stand-in for a data set, not a benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from slimming.data.detection import DetectionData, Source
from slimming.data.digits import read_digits
from slimming.data.image_files import list_images, open_image
from slimming.data.sampler import mix
from slimming.errors import check_number

SMALLEST, LARGEST = 0.14, 0.42  # height of an object, as a share of the scene's
ASPECT = (0.8, 1.25)  # a pasted object is stretched by a factor in here
OVERLAP = 0.1  # share of the smaller of two objects that the other may hide
TRIES = 12  # to find a place for an object; it is left out then
INK = 96  # of 255: how opaque a pixel must be to belong to a digit
CONTRAST = 90  # of 255: between a digit and the background around it
CACHE_BYTES = 2**30  # scenes are kept in memory if they fit in here
GREY = np.array([0.299, 0.587, 0.114])


class Objects(Protocol):
    """What is pasted: `labels`, the class of each object, and the objects as images (L: a mask for a colour; RGB)."""

    labels: np.ndarray

    def image(self, index: int) -> Image.Image: ...


class DigitObjects:
    """The embedded handwritten digits, of 8x8 pixels."""

    def __init__(self, train: bool):
        pixels, self.labels = read_digits(train)
        self.masks = np.rint(pixels * (255 / 16)).astype(np.uint8)  # (n, 8, 8)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.masks[index])


class FileObjects:
    """Images of a folder, opened whenever they are pasted."""

    def __init__(self, files: Sequence[Path], labels: np.ndarray):
        self.files, self.labels = files, labels

    def image(self, index: int) -> Image.Image:
        return open_image(self.files[index])


class SceneImages:
    """Scenes, each a function of seed and index alone; kept in memory once they are made, if all of them fit."""

    def __init__(self, count: int, size: int, objects: Objects, most: int, seed: int):
        self.count, self.size, self.objects, self.most, self.seed = count, size, objects, most, seed
        fits = count * 3 * size * size <= CACHE_BYTES
        self.images = torch.empty(count, 3, size, size, dtype=torch.uint8) if fits else None
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # index -> boxes and labels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if index in self.known:
            return self.images[index], *self.known[index]
        rng = np.random.default_rng(mix(self.seed, index))
        scene, boxes, labels = make_scene(rng, self.size, self.objects, self.most)
        image = torch.from_numpy(np.array(scene)).permute(2, 0, 1)
        found = torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(labels)
        if self.images is None:
            return image.contiguous(), *found
        self.images[index], self.known[index] = image, found
        return self.images[index], *found


Corners = tuple[int, int, int, int]  # x1 y1 x2 y2 in pixels


def make_scene(
    rng: np.random.Generator, size: int, objects: Objects, most: int
) -> tuple[Image.Image, list[Corners], list[int]]:
    """Paste 1 to `most` objects on a background; returns the scene, and the objects' boxes and classes."""
    scene = background(rng, size)
    taken: list[Corners] = []
    boxes, labels = [], []
    for index in rng.integers(len(objects.labels), size=rng.integers(1, most + 1)):
        image = _resized(rng, objects.image(index), size)
        place = _free_place(rng, image.size, size, taken)
        if place is not None:
            taken.append(place)
            boxes.append(_paste(rng, scene, image, place))
            labels.append(int(objects.labels[index]))
    return scene, boxes, labels


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw a texture: blurred patches of colour, and finer ones over them, of random sizes and strength."""
    coarse, fine = rng.integers(2, 7), rng.integers(8, size // 2 + 1)
    layers = [
        Image.fromarray(rng.integers(256, size=(cells, cells, 3), dtype=np.uint8)).resize((size, size), how)
        for cells, how in ((coarse, Image.Resampling.BICUBIC), (fine, Image.Resampling.BILINEAR))
    ]
    return Image.blend(*layers, alpha=rng.uniform(0.05, 0.4))


def _resized(rng: np.random.Generator, image: Image.Image, size: int) -> Image.Image:
    """Return an object at a random height, stretched a little."""
    height = size * SMALLEST * (LARGEST / SMALLEST) ** rng.random()  # each scale as likely as another
    width = height * image.width / image.height * rng.uniform(*ASPECT)
    shrink = min(1, LARGEST * size / width)
    return image.resize((max(2, round(width * shrink)), max(2, round(height * shrink))), Image.Resampling.BICUBIC)


def _free_place(
    rng: np.random.Generator, wanted: tuple[int, int], size: int, taken: Sequence[Corners]
) -> Corners | None:
    """Return a random place inside the scene that hides little of what is there; None if none is found."""
    w, h = wanted
    for x, y in rng.integers((size - w + 1, size - h + 1), size=(TRIES, 2)).tolist():
        place = x, y, x + w, y + h
        if all(_overlap(place, other) <= OVERLAP for other in taken):
            return place
    return None


def _overlap(a: Corners, b: Corners) -> float:
    """Return the area that two boxes share, as a share of the smaller one's."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(width, 0) * max(height, 0) / smaller


def _paste(rng: np.random.Generator, scene: Image.Image, image: Image.Image, place: Corners) -> Corners:
    """Paste an object; returns its box: an image's whole rectangle, the ink of a digit alone."""
    if image.mode == "RGB":
        scene.paste(image, place)
        return place
    scene.paste(_ink(rng, scene.crop(place)), place, image)
    x1, y1, x2, y2 = image.point(_IS_INK).getbbox() or (0, 0, *image.size)
    return place[0] + x1, place[1] + y1, place[0] + x2, place[1] + y2


_IS_INK = [255 * (value >= INK) for value in range(256)]


def _ink(rng: np.random.Generator, around: Image.Image) -> tuple[int, ...]:
    """Return a random colour that is darker or lighter than what is around."""
    behind = np.array(around.resize((1, 1), Image.Resampling.BOX))[0, 0] @ GREY
    colour = rng.integers(256, size=3)
    if abs(colour @ GREY - behind) < CONTRAST:
        colour = colour // 4 + (0 if behind > 127 else 191)
    return tuple(colour.tolist())


class Scenes(DetectionData):
    """Scenes of 1 to `objects` objects at random places and scales on textured backgrounds: for trying things out.

    The objects are the embedded digits, or images of a folder {train,test}/<class>/; test scenes show test images. Scenes are
    generated when they are asked for, every one a function of `scene_seed` and its number.
    """

    mean, std = (0.5, 0.5, 0.5), (0.21, 0.21, 0.21)  # of the scenes with digits

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 128,
        objects: int = 6,
        train_size: int = 5000,
        test_size: int = 1000,
        scene_seed: int = 0,
        flips: bool = False,
        jitter: float = 0,
        **kwargs,
    ):
        """Check the values; no scene is made yet.

        Args:
            root: holds train/<class>/ and test/<class>/; None: the embedded digits.
            objects: most objects of a scene.
            scene_seed: of the scenes; `seed` is that of their order and augmentation.
            flips: a mirrored digit is another one, or none.
        """
        super().__init__(image_size=image_size, flips=flips, jitter=jitter, **kwargs)
        check_number("data.image_size", image_size, 32, whole=True)
        for key, value in (("objects", objects), ("train_size", train_size), ("test_size", test_size)):
            check_number(f"data.{key}", value, 1, whole=True)
        check_number("data.scene_seed", scene_seed, 0, 2**32 - 1, whole=True)
        self.objects, self.scene_seed = objects, scene_seed
        self.counts = {"train": train_size, "test": test_size}
        if root is None:
            self.class_names = [str(digit) for digit in range(10)]
            self.listed = None
        else:
            self.class_names, listings = list_images(root, ("train", "test"))
            self.listed = dict(zip(("train", "test"), listings, strict=True))
        self.num_classes = len(self.class_names)

    def sources(self) -> dict[str, Source]:
        return {
            part: SceneImages(count, self.image_size, self._objects(part), self.objects, mix(self.scene_seed, number))
            for number, (part, count) in enumerate(self.counts.items())
        }

    def _objects(self, part: str) -> Objects:
        if self.listed is None:
            return DigitObjects(part == "train")
        return FileObjects(self.listed[part].paths(), self.listed[part].labels)
