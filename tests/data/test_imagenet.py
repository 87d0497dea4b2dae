"""Folders that are decoded while training: reproducible, bounded in memory, refused with a reason."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from slimming.data import ImageNet
from slimming.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "tree" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "tree"


def module(tree, **kwargs):
    data = ImageNet(**{"root": str(tree), "image_size": 32, "batch_size": 4, "num_workers": 0} | kwargs)
    data.setup()
    return data


def batches(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_batches_are_uint8_and_every_image_comes_once(root):
    data = module(root, augment=False)
    assert data.num_classes == 2 and data.statistics()["classes"] == ["cat", "dog"]
    seen = batches(data, 0)
    assert seen[0][0].dtype == torch.uint8 and seen[0][0].shape == (4, 3, 32, 32)
    labels = torch.cat([y for _, y in seen])
    assert labels.bincount().tolist() == [6, 6] and len(torch.cat([x for x, _ in seen]).unique(dim=0)) == 12
    held = list(data.test_dataloader())
    assert sum(len(y) for _, y in held) == 6 and torch.cat([y for _, y in held]).tolist() == [0, 0, 0, 1, 1, 1]
    normal = data.transform(seen[0][0], augment=True)
    assert normal.dtype == torch.float32 and normal.shape == (4, 3, 32, 32)


def test_augmentation_is_a_function_of_seed_epoch_and_image(root):
    data = module(root)
    torch.manual_seed(1)
    first = batches(data, 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = batches(module(root, num_workers=2), 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], batches(data, 4)[0][0])
    assert not torch.equal(first[0][0], batches(module(root, seed=1), 3)[0][0])


def test_the_evaluation_recipe_is_resize_then_centre(root):
    from torchvision.transforms import v2

    data = module(root)
    image = Image.open(root / "val/cat/1.png").convert("RGB")
    expected = v2.PILToTensor()(v2.CenterCrop(32)(v2.Resize(37, antialias=True)(image)))  # 32 * 256 / 224
    assert torch.equal(data.splits["test"][1][0], expected)


def test_a_validation_split_is_not_augmented(root):
    data = module(root, val_size=4)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 8, "val": 4, "test": 6}
    assert torch.equal(data.splits["val"][0][0], data.splits["val"][4][0])  # the same image an epoch later


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: {"root": None}, "data.root must name a folder"),
        (lambda root: {"root": root / "none"}, "train is not there"),
        (
            lambda root: [(root / part / "emu").mkdir() for part in ("train", "val")] and {},
            r"no images .* in train/emu",
        ),
        (
            lambda root: os.rename(root / "val/dog", root / "val/emu") or {},
            r"only in train: \['dog'\], only in val: \['emu'\]",
        ),
        (lambda root: [shutil.rmtree(root / part / "dog") for part in ("train", "val")] and {}, "at least two classes"),
    ],
)
def test_bad_trees(damage, words, root):
    with pytest.raises(DataError, match=words):
        module(root, **damage(root))


def test_bad_values(root):
    with pytest.raises(ConfigError, match=r"data\.num_workers"):
        module(root, num_workers=-1)
    with pytest.raises(ConfigError, match="more than the 12 training images"):
        module(root, batch_size=64)
    (root / "val/cat/0.png").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^\S+0\.png cannot be read as an image .*: mend or remove it$"):
            next(iter(module(root, num_workers=workers).test_dataloader()))


@pytest.mark.slow
def test_memory_is_bounded_for_a_large_tree(tmp_path):
    """100,000 file names take less than 40 MB."""
    for part, count in (("train", 98_000), ("val", 2_000)):
        for c in range(10):
            folder = tmp_path / part / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count // 10):
                os.close(os.open(folder / f"image_{i:08}.jpeg", os.O_CREAT))
    code = (
        "import resource, sys, torch, torchvision; from slimming.data import ImageNet\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); data = ImageNet(root=sys.argv[1]); data.setup(); iter(data.train_dataloader().sampler)\n"
        "print(len(data.splits['train']), peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    count, grown = out.split()
    assert int(count) == 98_000 and float(grown) < 40, out
