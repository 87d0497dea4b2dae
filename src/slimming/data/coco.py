"""COCO's JSON: images, annotations with `bbox` in pixels (x, y, width, height of the box), categories."""

import json
from pathlib import Path
from typing import Any

from slimming.data.box_lists import Box, BoxList, box_list, checked_box, number
from slimming.errors import DataError

KEYS = ("images", "annotations", "categories")


def read_json(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Read an annotation file.

    Raises:
        DataError: it is not there, no JSON, or no COCO annotations.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the annotations {file} cannot be read ({error}): set data.annotations") from error
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error})") from error
    for key in KEYS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file}: a COCO annotation file holds the lists {', '.join(KEYS)}; {key!r} is missing")
    return content


def categories(file: Path, content: dict[str, list[dict[str, Any]]]) -> dict[Any, str]:
    """Return the names of the classes by category id, in the order of the ids.

    Raises:
        DataError: no category, one without id or name, or an id twice.
    """
    found: dict[Any, str] = {}
    for item in content["categories"]:
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("id"), int)
            or "name" not in item
            or item["id"] in found
        ):
            raise DataError(f"{file}: every category needs a name and an id of its own; got {str(item)[:80]}")
        found[item["id"]] = str(item["name"])
    if not found:
        raise DataError(f"{file}: there are no categories")
    return dict(sorted(found.items()))


def read_boxes(file: Path, content: dict[str, list[dict[str, Any]]], root: Path, part: str) -> BoxList:
    """Read and check the boxes of all images of an annotation file.

    Crowds (`iscrowd`: 1) are left out, and so are boxes of no width or no height, of which COCO's own files hold a few.

    Raises:
        DataError: an image or a box that is not as it should be, or no box at all.
    """
    labels = {category: label for label, category in enumerate(categories(file, content))}
    images = {}
    for item in content["images"]:
        if (
            not isinstance(item, dict)
            or not {"file_name", "width", "height"} <= set(item)
            or not _is_id(item.get("id"))
        ):
            raise DataError(f"{file}: every image needs id, file_name, width and height; got {str(item)[:80]}")
        if min(number(f"{file}: image {item['file_name']}", item[key]) for key in ("width", "height")) <= 0:
            raise DataError(f"{file}: image {item['file_name']} has {item['width']}x{item['height']} pixels")
        images[item["id"]] = item
    boxes: dict[Any, list[Box]] = {key: [] for key in images}
    flat = []
    for position, item in enumerate(content["annotations"]):
        if not isinstance(item, dict):
            raise DataError(f"{file}, annotation {position + 1}: no object but {str(item)[:80]}")
        where = f"{file}, annotation {position + 1} (id {item.get('id')})"
        if not _is_id(item.get("image_id")) or item["image_id"] not in images:
            raise DataError(f"{where}: its image_id {item.get('image_id')!r} is not among the images")
        if item.get("iscrowd"):
            continue
        if (box := _box(where, item, images[item["image_id"]], labels)) is None:
            flat.append(where)
        else:
            boxes[item["image_id"]].append(box)
    if flat:
        print(f"{len(flat)} boxes of no area are left out, the first: {flat[0]}")
    if not any(boxes.values()):
        raise DataError(f"{file}: there is no box for any of its {len(images)} images")
    return box_list(_files(file, list(images.values()), root, part), boxes.values())


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _box(where: str, item: dict[str, Any], image: dict[str, Any], labels: dict[Any, int]) -> Box | None:
    """Return a box, None for one of no area."""
    if not _is_id(item.get("category_id")) or item["category_id"] not in labels:
        raise DataError(f"{where}: category_id {item.get('category_id')!r} is not one of the {len(labels)} categories")
    box = item.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise DataError(f"{where}: bbox is 4 numbers (x, y, width, height in pixels), got {box}")
    x, y, w, h = (number(where, value) for value in box)
    if w < 0 or h < 0:
        raise DataError(f"{where}: the box {box} has a negative width or height: mend or remove it")
    if w == 0 or h == 0:
        return None
    corners = x / image["width"], y / image["height"], (x + w) / image["width"], (y + h) / image["height"]
    written = f"{box} of an image of {image['width']}x{image['height']} pixels"
    return checked_box(where, labels[item["category_id"]], corners, written)


def _files(file: Path, images: list[dict[str, Any]], root: Path, part: str) -> list[Path]:
    """Return the paths of images: below the first of the usual folders that holds the first of them."""
    names = part, f"{part}2017", f"{part}2014"
    folders = [root, root / "images", *(root / name for name in names), *(root / "images" / name for name in names)]
    folders += [root / other for other in ("val2017", "val2014")] + [file.parent]  # COCO's test images have no boxes
    first = images[0]["file_name"]
    folder = next((folder for folder in folders if (folder / first).is_file()), None)
    if folder is None:
        places = ", ".join(dict.fromkeys(map(str, folders)))
        raise DataError(f"{file}: its first image, {first}, is in none of {places}: set data.root")
    files = [folder / item["file_name"] for item in images]
    if missing := next((path for path in files if not path.is_file()), None):
        raise DataError(f"{file}: the image {missing} is not there")
    return files
