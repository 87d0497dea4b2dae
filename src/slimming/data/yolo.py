"""YOLO-format folders: an image, and a text file of the same name with a line `class cx cy w h` for every box.

Values are shares of the image's width and height. An image without a text file, or with an empty one, is a background.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from slimming.data.box_lists import Box, BoxList, box_list, checked_box, number
from slimming.data.image_files import EXTENSIONS
from slimming.errors import DataError

PARTS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}  # part -> its names
LAYOUT = (
    "images/train/ and images/val/ or images/test/ (or train/images/ and so on), or images/ with train.txt and val.txt or "
    "test.txt, or images/ alone; the boxes in labels/ beside images/"
)
FIELDS = "class, centre x, centre y, width, height"


def find_images(root: Path) -> dict[str, list[Path]]:
    """Return the image files by part, sorted; `train` alone where nothing says what is what.

    Raises:
        DataError: no such folder, a part without images, an image of a list that is not there.
    """
    folders = _folders(root)
    lists = {part: file for part, names in PARTS.items() for name in names if (file := root / f"{name}.txt").is_file()}
    if "train" in folders:
        found = {part: images_below(folder) for part, folder in folders.items()}
    elif "train" in lists:
        found = {part: _listed(root, file) for part, file in lists.items()}
    elif (root / "images").is_dir():
        found = {"train": images_below(root / "images")}
    else:
        raise DataError(f"data.root={root} holds no training images; the layout is {LAYOUT}")
    for part, files in found.items():
        if not files:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise DataError(
                f"data.root={root}: there are no images ({kinds}) in the {part} part; the layout is {LAYOUT}"
            )
    return found


def _folders(root: Path) -> dict[str, Path]:
    found = {}
    for part, names in PARTS.items():
        for name in names:
            for folder in (root / "images" / name, root / name / "images"):
                if folder.is_dir():
                    found.setdefault(part, folder)
    return found


def images_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS)


def _listed(root: Path, file: Path) -> list[Path]:
    found = []
    for line, name in enumerate(_lines(file), 1):
        if not name.strip():
            continue
        found.append(root / name.strip())
        if not found[-1].is_file():
            raise DataError(f"{file}, line {line}: the image {found[-1]} is not there")
    return found


def label_file(image: Path) -> Path:
    """Return where the boxes of an image are: below `labels` in place of the last `images`, else beside the image."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def read_boxes(root: Path, images: Sequence[Path], num_classes: int) -> BoxList:
    """Read and check the boxes of images.

    Raises:
        DataError: a line that is no box of one of the classes, or no box in any file.
    """
    found = box_list(images, (_read(label_file(image), num_classes) for image in images))
    if not len(found.boxes):
        raise DataError(
            f"data.root={root}: there is no box for any of the {len(images)} images of {images[0].parent}; "
            f"that of {images[0].name} would be in {label_file(images[0])}"
        )
    return found


def check_no_label_is_left(images: Iterable[Path]) -> None:
    """Raise DataError where a folder of label files holds one without an image."""
    known: dict[Path, set[str]] = {}
    for image in images:
        file = label_file(image)
        known.setdefault(file.parent, set()).add(file.stem)
    for folder, stems in known.items():
        for file in sorted(folder.glob("*.txt")):
            if file.stem not in stems and not _belongs(file):
                raise DataError(f"{file}: there is no image for this label file: add the image or remove the file")


def _belongs(file: Path) -> bool:
    """Return whether a text file has an image that is in no part, or is no label file."""
    if file.name == "classes.txt" or "labels" not in file.parts:
        return True
    parts = list(file.parts)
    parts[len(parts) - 1 - parts[::-1].index("labels")] = "images"
    image = Path(*parts)
    return any(image.with_suffix(ending).is_file() for kind in EXTENSIONS for ending in (kind, kind.upper()))


def _read(file: Path, num_classes: int) -> list[Box]:
    if not file.is_file():
        return []
    lines = enumerate(_lines(file), 1)
    return [_box(f"{file}, line {i}", line.split(), num_classes) for i, line in lines if line.strip()]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text ({error}): mend or remove it") from error


def _box(where: str, fields: list[str], num_classes: int) -> Box:
    if len(fields) != 5:
        raise DataError(f"{where}: a box is 5 numbers ({FIELDS}), found {len(fields)}: {' '.join(fields)[:80]!r}")
    label, cx, cy, w, h = (number(where, field) for field in fields)
    if label != int(label) or not 0 <= label < num_classes:
        raise DataError(f"{where}: class {fields[0]} is not one of the {num_classes} classes, 0 ... {num_classes - 1}")
    written = " ".join(fields[1:])
    if w <= 0 or h <= 0:
        raise DataError(f"{where}: the box {written} has no area: mend or remove it")
    return checked_box(where, int(label), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), f"{written} (shares)")


def class_names(root: Path) -> list[str] | None:
    """Return the names of the classes as data.yaml or classes.txt gives them; None without either.

    Raises:
        DataError: a file that cannot be read, or holds no names.
    """
    if (file := root / "data.yaml").is_file():
        return _names_of_yaml(file)
    for file in (root / "classes.txt", root / "labels" / "classes.txt"):
        if file.is_file():
            names = [line.strip() for line in _lines(file) if line.strip()]
            if not names:
                raise DataError(f"{file} holds no class name: write one a line")
            return names
    return None


def _names_of_yaml(file: Path) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load("\n".join(_lines(file)))
    except yaml.YAMLError as error:
        raise DataError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(
            f"{file}: `names` must list the names of the classes, or give one for each of 0, 1, 2 ...; got {names}"
        )
    return [str(name) for name in names]
