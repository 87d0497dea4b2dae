"""Generated scenes: the same bits everywhere, boxes where the objects are, little overlap."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from slimming.data import Scenes, scenes
from slimming.errors import ConfigError, DataError


def module(**kwargs):
    data = Scenes(**{"train_size": 24, "test_size": 12, "image_size": 64, "batch_size": 8} | kwargs)
    data.setup()
    return data


def items(split):
    return [split[i] for i in range(len(split))]


def same(some, others):
    return all(
        torch.equal(a, b) and torch.equal(s["boxes"], t["boxes"]) and torch.equal(s["labels"], t["labels"])
        for (a, s), (b, t) in zip(some, others, strict=True)
    )


def test_facts_and_batches():
    data = module(val_size=0.25)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 3, 64)
    assert data.class_names == list("0123456789") == data.statistics()["classes"]
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 18, "val": 6, "test": 12}
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 64, 64) and images.dtype == torch.uint8 and len(targets) == 8
    for target in targets:
        boxes, labels = target["boxes"], target["labels"]
        assert boxes.dtype == torch.float32 and labels.dtype == torch.int64 and 1 <= len(boxes) == len(labels) <= 6
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 64).all() and (boxes[:, :2] < boxes[:, 2:]).all()


def test_the_same_bits_in_any_order_and_any_process():
    first = items(module().splits["train"])
    again = module().splits["train"]
    assert same(first, [again[i] for i in reversed(range(len(again)))][::-1])
    assert same(first, items(again))  # from memory
    assert same(first, items(module(seed=5).splits["train"]))
    workers = torch.utils.data.DataLoader(module().splits["train"], None, num_workers=2)
    assert same(first, list(workers))
    assert not same(first, items(module(scene_seed=1).splits["train"]))


def test_nothing_is_kept_where_it_would_not_fit(monkeypatch):
    expected = items(module().splits["test"])
    monkeypatch.setattr(scenes, "CACHE_BYTES", 1000)
    data = module()
    assert data.splits["test"].source.images is None
    assert same(expected, items(data.splits["test"])) and same(expected, items(data.splits["test"]))


def test_train_and_test_scenes_share_no_object_and_no_background():
    data = module()
    assert len(data.splits["train"].source.objects.labels) == 1438
    assert len(data.splits["test"].source.objects.labels) == 359
    firsts = [data.splits[part][0][0] for part in ("train", "test")]
    assert not torch.equal(*firsts)


def test_boxes_enclose_what_was_pasted(monkeypatch):
    """On black backgrounds, with white ink, no pixel of ink lies outside the boxes, and each box touches some on all sides."""
    monkeypatch.setattr(scenes, "background", lambda rng, size: Image.new("RGB", (size, size)))
    monkeypatch.setattr(scenes, "_ink", lambda rng, around: (255, 255, 255))
    monkeypatch.setattr(scenes, "OVERLAP", -1)  # no two boxes: one object is placed
    monkeypatch.setattr(scenes, "TRIES", 1)
    for image, target in items(module(objects=1).splits["train"]):
        (box,) = target["boxes"].int().tolist()
        ink = image[0] >= scenes.INK
        ys, xs = ink.any(1).nonzero(), ink.any(0).nonzero()
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_objects_hide_little_of_each_other_and_come_in_all_scales():
    targets = [target for _, target in items(module(train_size=200, image_size=128).splits["train"])]
    counts = torch.tensor([len(t["labels"]) for t in targets])
    assert counts.min() == 1 and counts.max() == 6 and 2.5 < counts.float().mean() < 3.7
    assert torch.cat([t["labels"] for t in targets]).bincount(minlength=10).min() > 30
    heights = torch.cat([t["boxes"][:, 3] - t["boxes"][:, 1] for t in targets])
    assert heights.min() < 22 and heights.max() > 45
    rng = np.random.default_rng(0)
    for _ in range(50):
        taken = []
        for _ in range(6):
            if place := scenes._free_place(rng, (30, 40), 128, taken):
                assert all(scenes._overlap(place, other) <= scenes.OVERLAP for other in taken)
                taken.append(place)
    assert scenes._overlap((0, 0, 10, 10), (5, 5, 30, 30)) == 0.25 and scenes._overlap((0, 0, 5, 5), (5, 0, 9, 9)) == 0


def test_digits_stand_out_from_the_background():
    rng = np.random.default_rng(0)
    for grey in range(0, 256, 15):
        colour = scenes._ink(rng, Image.new("RGB", (5, 5), (grey,) * 3))
        assert abs(np.array(colour) @ scenes.GREY - grey) >= 60


def test_normalised_scenes_have_about_no_mean_and_unit_deviation():
    data = module(train_size=200, image_size=128, batch_size=200)
    images, _ = next(iter(data.train_dataloader()))
    normal = data.transform(images)
    assert abs(float(normal.mean())) < 0.05 and 0.9 < float(normal.std()) < 1.1


@pytest.fixture
def folder(tmp_path):
    for part, value in (("train", 255), ("test", 254)):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            colour = (value, 0, 0) if number else (0, 0, value)
            Image.new("RGB", (30, 20), colour).save(tmp_path / part / name / "0.png")
    return tmp_path


def test_images_of_a_folder_are_pasted_whole(folder):
    data = module(root=str(folder), flips=True)
    assert data.class_names == ["cat", "dog"] and data.num_classes == 2
    for part, value in (("train", 255), ("test", 254)):
        seen = 0
        for image, target in items(data.splits[part]):
            for box, label in zip(target["boxes"].int().tolist(), target["labels"].tolist(), strict=True):
                x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
                expected = [value, 0, 0] if label else [0, 0, value]
                seen += image[:, y, x].tolist() == expected  # a later one may lie over it
        assert seen > 0.9 * sum(len(t["labels"]) for _, t in items(data.splits[part]))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"objects": 0}, r"data\.objects .* got 0"),
        ({"train_size": 1.5}, r"data\.train_size .* got 1.5"),
        ({"test_size": 0}, r"data\.test_size .* got 0"),
        ({"scene_seed": -1}, r"data\.scene_seed .* got -1"),
        ({"image_size": 16}, r"data\.image_size .*>= 32, got 16"),
        ({"batch_size": 25}, "more than the 24 training images"),
    ],
)
def test_bad_values(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        module(**kwargs)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="train is not there"):
        module(root=str(tmp_path / "none"))


@pytest.mark.slow
def test_hundreds_of_scenes_in_a_second():
    split = module(train_size=300, image_size=128).splits["train"]
    start = time.process_time()
    items(split)
    assert time.process_time() - start < 1.5
