"""Boxes from YOLO-format folders and COCO JSON: where they end up in the network's input, and what is refused how."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from slimming.data import Boxes
from slimming.data.detection import collate
from slimming.data.image_files import open_image
from slimming.errors import ConfigError, DataError

RED = (255, 0, 0)


def picture(path, size=(37, 23), box=None, colour=RED):
    """Save a black image (w, h) with a filled box (x1, y1, x2, y2)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    if box:
        pixels[box[1] : box[3], box[0] : box[2]] = colour
    Image.fromarray(pixels).save(path)


def line(label, box, size):
    """Write a box in pixels as a line of a YOLO file."""
    (x1, y1, x2, y2), (w, h) = box, size
    return f"{label} {(x1 + x2) / 2 / w:.6f} {(y1 + y2) / 2 / h:.6f} {(x2 - x1) / w:.6f} {(y2 - y1) / h:.6f}\n"


SIZES = [(37, 23), (16, 41), (32, 32), (50, 20), (7, 60)]


def write(images, labels, count, seed=0):
    """Write images with a red box each, the last of them a background without a label file."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        w, h = size = SIZES[i % len(SIZES)]
        x1, y1 = int(rng.integers(0, w // 2)), int(rng.integers(0, h // 2))
        box = (x1, y1, x1 + int(rng.integers(3, w - x1 + 1)), y1 + int(rng.integers(3, h - y1 + 1)))
        last = i == count - 1
        picture(images / f"{i}.png", size, None if last else box)
        labels.mkdir(parents=True, exist_ok=True)
        if not last:
            (labels / f"{i}.txt").write_text(line(i % 2, box, size))


@pytest.fixture
def root(tmp_path):
    """A YOLO-format folder with 8 training and 5 validation images of odd sizes."""
    root = tmp_path / "tree"
    for part, count in (("train", 8), ("val", 5)):
        write(root / "images" / part, root / "labels" / part, count, seed=count)
    (root / "data.yaml").write_text("names: {0: cat, 1: dog}\ntrain: images/train\n")
    return root


def module(root, **kwargs):
    data = Boxes(**{"root": str(root), "image_size": 64, "batch_size": 4, "num_workers": 0} | kwargs)
    data.setup()
    return data


def batches(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_boxes_lie_on_red(images, targets, within=1.01):
    """Compare every box with where the red pixels of its image are; images without red have no box."""
    for image, target in zip(images, targets, strict=True):
        red = (image[0].int() - image[2].int()) > 127
        if not red.any():
            assert target["boxes"].shape == (0, 4)
            continue
        ys, xs = red.any(1).nonzero(), red.any(0).nonzero()
        found = torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], dtype=torch.float32)
        torch.testing.assert_close(target["boxes"], found, atol=within, rtol=0)


def test_facts_and_batches(root):
    data = module(root, augment=False)
    assert (data.num_classes, data.class_names, data.in_channels, data.image_size) == (2, ["cat", "dog"], 3, 64)
    assert data.statistics()["classes"] == ["cat", "dog"]
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 8, "test": 5}
    images, targets = next(iter(data.test_dataloader()))
    assert images.shape == (5, 3, 64, 64) and images.dtype == torch.uint8
    assert [len(t["labels"]) for t in targets] == [1, 1, 1, 1, 0]
    assert [t["labels"].tolist() for t in targets] == [[0], [1], [0], [1], []]
    assert all(t["boxes"].dtype == torch.float32 and t["labels"].dtype == torch.int64 for t in targets)
    assert targets[-1]["boxes"].shape == (0, 4)


def test_images_are_normalised_on_the_device_and_targets_left_alone(root):
    data = module(root)
    images, targets = next(iter(data.test_dataloader()))
    data.trainer = SimpleNamespace(training=True, lightning_module=SimpleNamespace(dtype=torch.float64))
    normal, same = data.on_after_batch_transfer((images, targets), 0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    assert normal.dtype == torch.float64 and same is targets
    torch.testing.assert_close(normal.float(), (images / 255 - mean) / std, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad", ["mean", "black"])
def test_letterboxing_keeps_aspect_ratios_and_moves_the_boxes(root, pad):
    data = module(root, augment=False, pad=pad)
    for images, targets in (next(iter(data.test_dataloader())), batches(data, 0)[0]):
        assert_boxes_lie_on_red(images, targets)
    image, _ = data.splits["test"][3]  # 50x20 pixels become 64x26
    bar = [round(255 * m) for m in data.mean] if pad == "mean" else [0, 0, 0]
    assert image[:, 18, 10].tolist() == bar == image[:, 45, 10].tolist()
    assert (image[1:, 19:45] == 0).all()
    image, _ = data.splits["test"][4]  # 7x60
    assert (image[:, :, 28:35] == 0).all() and image[:, 0, 27].tolist() == bar


def test_augmentation_moves_boxes_with_their_pixels(root):
    data = module(root, jitter=0)
    mirrored = 0
    plain = {t["boxes"].sum().item() for _, targets in batches(module(root, augment=False), 0) for t in targets}
    for epoch in range(4):
        for images, targets in batches(data, epoch):
            assert_boxes_lie_on_red(images, targets)
            mirrored += sum(t["boxes"].sum().item() not in plain for t in targets)
    assert 4 < mirrored < 28


def test_jitter_changes_pixels_of_training_images_alone(root):
    plain, data = module(root, augment=False), module(root, flips=False, jitter=0.5)
    for (a, _), (b, _) in zip(batches(plain, 0), batches(data, 0), strict=True):
        assert not torch.equal(a, b)
    a, b = (next(iter(d.test_dataloader()))[0] for d in (plain, data))
    assert torch.equal(a, b)


def test_augmentation_is_a_function_of_seed_epoch_and_image(root):
    def same(some, others):
        pairs = list(zip(some, others, strict=True))
        return all(torch.equal(a, b) for (a, _), (b, _) in pairs) and all(
            torch.equal(s["boxes"], t["boxes"]) for (_, a), (_, b) in pairs for s, t in zip(a, b, strict=True)
        )

    data = module(root)
    torch.manual_seed(1)
    first = batches(data, 3)
    state = torch.get_rng_state()
    again = batches(module(root, num_workers=2), 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, again)
    assert not same(first, batches(data, 4)) and not same(first, batches(module(root, seed=1), 3))


def test_training_batches_for_calibration_are_images_alone(root):
    found = list(module(root).training_batches(3, torch.device("cpu")))
    assert [x.shape for x in found] == [(4, 3, 64, 64)] * 3 and found[0].dtype == torch.float32


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_parts_may_come_first_and_all_three_be_there(tmp_path):
    for part, count in (("train", 5), ("valid", 3), ("test", 4)):
        write(tmp_path / part / "images", tmp_path / part / "labels", count)
    data = module(tmp_path, classes=["a", "b"])
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 5, "val": 3, "test": 4}
    with pytest.raises(ConfigError, match=r"val_size=0.5 and the validation part"):
        module(tmp_path, classes=["a", "b"], val_size=0.5)


def test_a_flat_folder_is_split(tmp_path):
    write(tmp_path / "images", tmp_path / "labels", 20)
    (tmp_path / "labels" / "classes.txt").write_text("cat\ndog\n")
    data = module(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 16, "test": 4}
    data = module(tmp_path, test_size=5, val_size=0.2)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 12, "val": 3, "test": 5}
    assert torch.equal(torch.cat([s.indices for s in data.splits.values()]).sort().values, torch.arange(20))
    assert torch.equal(module(tmp_path, test_size=5, seed=7).splits["test"].indices, data.splits["test"].indices)
    with pytest.raises(ConfigError, match=r"data\.test_size=20 would hold out 20 of 20 .* at least one on either side"):
        module(tmp_path, test_size=20)
    with pytest.raises(ConfigError, match=r"data\.test_size must be a number > 0"):
        module(tmp_path, test_size=0)


def test_files_may_say_what_is_what(tmp_path):
    write(tmp_path / "images", tmp_path / "labels", 9)
    (tmp_path / "train.txt").write_text("".join(f"./images/{i}.png\n" for i in (5, 0, 1, 2)))
    (tmp_path / "test.txt").write_text("images/3.png\n\nimages/8.png\n")
    data = module(tmp_path, classes=["a", "b"])
    assert [len(t["labels"]) for t in next(iter(data.test_dataloader()))[1]] == [1, 0]
    with pytest.raises(
        ConfigError, match=r"data\.test_size=0.5 and the parts train, test of the data exclude each other"
    ):
        module(tmp_path, classes=["a", "b"], test_size=0.5)
    (tmp_path / "test.txt").write_text("images/3.png\nimages/none.png\n")
    with pytest.raises(DataError, match=r"test\.txt, line 2: the image \S+none\.png is not there"):
        module(tmp_path, classes=["a", "b"])


@pytest.mark.parametrize(
    ("name", "text"),
    [("data.yaml", "nc: 2\nnames: [cat, 7]\n"), ("data.yaml", "names: {1: 7, 0: cat}"), ("classes.txt", "cat\n7")],
)
def test_names_of_classes(root, name, text):
    (root / "data.yaml").unlink()
    (root / name).write_text(text)
    assert module(root).class_names == ["cat", "7"]
    assert module(root, classes=["x", "y"]).class_names == ["x", "y"]


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco(root, folder, count, seed=0, categories=((3, "cat"), (9, "dog"))):
    """Write images and the content of their annotation file."""
    rng, content = np.random.default_rng(seed), {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": name} for number, name in reversed(categories)]
    for i in range(count):
        w, h = size = SIZES[i % len(SIZES)]
        x, y = int(rng.integers(0, w // 2)), int(rng.integers(0, h // 2))
        box = (x, y, x + 3, y + 4)
        picture(root / folder / f"{i}.png", size, box if i else None)
        content["images"].append({"id": 10 + i, "file_name": f"{i}.png", "width": w, "height": h})
        if i:
            common = {"image_id": 10 + i, "category_id": categories[i % 2][0]}
            content["annotations"].append({"id": i, "bbox": [x, y, 3, 4], **common})
    content["annotations"].append({"id": 99, "bbox": [0, 0, 5, 5], "image_id": 10, "category_id": 3, "iscrowd": 1})
    return content


@pytest.fixture
def coco_root(tmp_path):
    (tmp_path / "annotations").mkdir()
    for part, count in (("train", 6), ("val", 3)):
        (tmp_path / "annotations" / f"{part}.json").write_text(json.dumps(coco(tmp_path, f"{part}2017", count, count)))
    return tmp_path


ANNOTATIONS = {"train": "annotations/train.json", "val": "annotations/val.json", "test": None}


def test_coco(coco_root):
    data = module(coco_root, annotations=ANNOTATIONS, augment=False, image_size=60)
    assert data.class_names == ["cat", "dog"] and {k: len(v) for k, v in data.splits.items()} == {"train": 6, "test": 3}
    images, targets = next(iter(data.test_dataloader()))
    assert [t["labels"].tolist() for t in targets] == [[], [1], [0]]
    assert_boxes_lie_on_red(images, targets, within=1.5)


def test_coco_boxes_of_no_area_are_left_out(coco_root, capsys):
    file = coco_root / ANNOTATIONS["train"]
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][3] = 0
    file.write_text(json.dumps(content))
    data = module(coco_root, annotations=ANNOTATIONS, augment=False, image_size=60)
    assert sum(len(data.splits["train"][i][1]["labels"]) for i in range(6)) == 4
    assert "1 boxes of no area are left out, the first: " in capsys.readouterr().out


def test_photographs_are_turned_as_their_exif_data_say(tmp_path):
    pixels = np.zeros((6, 4, 3), dtype=np.uint8)
    pixels[0, 0] = 255  # upper left of the stored picture: upper right of the upright one
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").size == (4, 6)
    upright = np.asarray(open_image(tmp_path / "a.png", upright=True))
    assert upright.shape == (4, 6, 3) and upright[0, -1].min() == 255


def damage(**changes):
    """Return a function that changes the first annotation of a content."""
    return lambda content: content["annotations"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damage(bbox=[1, 2, 3]), r"annotation 1 \(id 1\): bbox is 4 numbers .* got \[1, 2, 3\]"),
        (damage(bbox=[1, 2, 3, "x"]), r"annotation 1 \(id 1\): 'x' is no number"),
        (damage(bbox=[1, 2, 3, -1]), r"annotation 1 .* \[1, 2, 3, -1\] has a negative width or height"),
        (damage(bbox=[1, 2, 3, 40]), r"annotation 1 .* 16x41 pixels reaches outside the image"),
        (damage(category_id=4), "category_id 4 is not one of the 2 categories"),
        (damage(image_id=5), "image_id 5 is not among the images"),
        (damage(image_id=[5]), r"image_id \[5\] is not among the images"),
        (lambda c: c.update(annotations=[7]), "annotation 1: no object but 7"),
        (lambda c: c.update(annotations=[]), "there is no box for any of its 6 images"),
        (lambda c: c.pop("images"), "'images' is missing"),
        (lambda c: c["images"][2].pop("width"), "every image needs id, file_name, width and height"),
        (lambda c: c["images"][2].update(width=0), r"2\.png has 0x32 pixels"),
        (lambda c: c["images"][3].update(file_name="none.png"), r"the image \S+none\.png is not there"),
        (lambda c: c["images"][0].update(file_name="none.png"), "first image, none.png, is in none of"),
        (lambda c: c.update(categories=[]), "there are no categories"),
        (lambda c: c["categories"][0].update(name="emu"), "must have the categories of"),
        (lambda c: c["categories"][0].update(id=3), "an id of its own"),
    ],
)
def test_bad_coco(coco_root, change, words):
    file = coco_root / ANNOTATIONS["train"]
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        module(coco_root, annotations=ANNOTATIONS)


def test_coco_files_that_cannot_be_read(coco_root):
    with pytest.raises(ConfigError, match=r"data\.classes is for YOLO-format folders"):
        module(coco_root, annotations=ANNOTATIONS, classes=["a"])
    with pytest.raises(ConfigError, match="must name the files of train, and of val or test; got val"):
        module(coco_root, annotations=ANNOTATIONS | {"train": None})
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        module(coco_root, annotations={"train": "none.json"})
    (coco_root / ANNOTATIONS["val"]).write_text("{")
    with pytest.raises(DataError, match=r"val\.json is no JSON"):
        module(coco_root, annotations=ANNOTATIONS)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 0.5 0.5 0.1\n", r"5 numbers \(class, centre x, .*\), found 4: '0 0.5 0.5 0.1'"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3\n", "found 7"),
        ("0 0.5 half 0.1 0.1\n", "'half' is no number"),
        ("0 0.5 nan 0.1 0.1\n", "'nan' is no number"),
        ("2 0.5 0.5 0.1 0.1\n", r"class 2 is not one of the 2 classes, 0 \.\.\. 1"),
        ("-1 0.5 0.5 0.1 0.1\n", "class -1 is not one"),
        ("0.5 0.5 0.5 0.1 0.1\n", "class 0.5 is not one"),
        ("0 0.9 0.5 0.3 0.1\n", r"the box 0.9 0.5 0.3 0.1 \(shares\) reaches outside the image"),
        ("0 18 11 4 4\n", r"the box 18 11 4 4 \(shares\) reaches outside the image"),
        ("0 0.5 0.5 0 0.1\n", "the box 0.5 0.5 0 0.1 has no area"),
        ("0 0.5 0.5 0.1 -0.1\n", "has no area"),
        ("0 1.0005 0.5 0.0005 0.1\n", "has no area"),
    ],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_bad_label_is_told_with_file_and_line(root, part, text, words):
    file = root / "labels" / part / "1.txt"
    file.write_text("0 0.5 0.5 0.1 0.1\n\n" + text)
    with pytest.raises(DataError, match=f"^{re.escape(str(file))}, line 3: .*{words}"):
        module(root)


def test_a_box_that_rounding_moved_over_the_edge_is_cut_off(root):
    (root / "labels" / "val" / "0.txt").write_text("1.0 0.75 0.5 0.501 1.001\n")
    boxes = module(root).splits["test"][0][1]["boxes"]
    assert boxes.min() >= 0 and boxes[0, 2] == 64


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: {"root": None}, r"data\.root must name a folder .* got None"),
        (lambda root: {"root": str(root / "none")}, r"data\.root must name a folder .* images/train/"),
        (lambda root: shutil.rmtree(root / "images"), "holds no training images; the layout is"),
        (
            lambda root: shutil.rmtree(root / "labels"),
            r"there is no box for any of the 8 images .*labels/train/0\.txt",
        ),
        (lambda root: [f.write_text("") for f in root.glob("labels/val/*")], "there is no box for any of the 5 images"),
        (lambda root: [f.unlink() for f in root.glob("images/val/*")], r"no images \(.*\) in the val part"),
        (lambda root: (root / "labels/train/9.txt").write_text(""), r"train/9\.txt: there is no image for this label"),
        (lambda root: (root / "images/val/2.png").unlink(), r"val/2\.txt: there is no image for this label file"),
        (lambda root: (root / "labels/val/2.txt").write_bytes(b"\xff\xfe0"), r"val/2\.txt cannot be read as text"),
        (lambda root: (root / "data.yaml").unlink(), r"names of the classes are needed.*; got None"),
        (lambda root: {"classes": ["a", "a"]}, "each one once"),
        (lambda root: (root / "data.yaml").write_text("a: [1"), r"data\.yaml is no YAML"),
        (lambda root: (root / "data.yaml").write_text("nc: 2"), r"data\.yaml: `names` must list .* got None"),
        (lambda root: (root / "data.yaml").write_text("names: {1: a, 2: b}"), "`names` must list"),
        (
            lambda root: (root / "data.yaml").unlink() or (root / "classes.txt").write_text("\n"),
            r"classes\.txt holds no class name",
        ),
    ],
)
def test_bad_folders(root, damage, words):
    changed = damage(root)
    kwargs = changed if isinstance(changed, dict) else {}
    with pytest.raises(DataError, match=words):
        Boxes(**{"root": str(root), "image_size": 64} | kwargs).setup()


def test_bad_values(root):
    for kwargs, words in (
        ({"image_size": 4}, r"data\.image_size .* got 4"),
        ({"jitter": 2}, r"data\.jitter .* got 2"),
        ({"flips": 1.5}, r"data\.flips"),
        ({"num_workers": -1}, r"data\.num_workers"),
        ({"mean": [0.5]}, "must hold 3 numbers"),
        ({"batch_size": 9}, "more than the 8 training images"),
    ):
        with pytest.raises(ConfigError, match=words):
            module(root, **kwargs)
    (root / "images/val/0.png").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^\S+0\.png cannot be read as an image .*: mend or remove it$"):
            next(iter(module(root, num_workers=workers).test_dataloader()))


def test_a_batch_without_any_box():
    images, targets = collate(
        [(torch.zeros(3, 8, 8), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()})] * 2
    )
    assert images.shape == (2, 3, 8, 8) and [t["boxes"].shape for t in targets] == [(0, 4)] * 2
