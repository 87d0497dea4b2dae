"""The data modules on what they publish, on small stand-ins of the official files, and on what goes wrong."""

import hashlib
import pickle
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from slimming.data import CIFAR10, CIFAR100, MNIST, SVHN, Digits, ImageFolder
from slimming.errors import ConfigError, DataError


def fill(root, sizes=(6, 4), classes=("ant", "bee"), pixels=(8, 8)):
    rng = np.random.default_rng(0)
    for part, n in zip(("train", "test"), sizes, strict=True):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixel = rng.integers(0, 256, (*pixels[::-1], 3), dtype=np.uint8)
                pixel[..., 2] = label * 200
                Image.fromarray(pixel).save(root / part / name / f"{i}.png")
    return root


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def test_digits():
    data = ready(Digits())
    train, test = data.splits["train"], data.splits["test"]
    assert (len(train), len(test)) == (1438, 359) and train.images.shape == (1438, 1, 32, 32)
    assert train.images.dtype == torch.uint8 and train.labels.unique().tolist() == list(range(10))
    assert not Digits.flips
    x = train.images.double() / 255
    assert data.mean[0] == pytest.approx(float(x.mean()), abs=5e-4)
    assert data.std[0] == pytest.approx(float(x.std()), abs=5e-4)


def test_batches_cover_an_epoch():
    data = ready(Digits(batch_size=100, val_size=0.1))
    assert [len(y) for _, y in data.train_dataloader()] == [100] * 12 + [1438 - 144 - 1200]
    assert sum(len(y) for _, y in data.val_dataloader()) == 144
    assert sum(len(y) for _, y in data.test_dataloader()) == 359
    assert ready(Digits()).val_dataloader().dataset is not None  # the test set stands in


def test_a_last_batch_of_one_image_is_dropped():
    assert [len(y) for _, y in ready(Digits(batch_size=479)).train_dataloader()] == [479, 479, 479]


def test_evaluation_is_not_augmented():
    data = ready(Digits())
    images, labels = data.splits["test"].__getitems__(list(range(50)))
    plain = (images / 255 - data.mean[0]) / data.std[0]
    data.trainer = SimpleNamespace(training=False, lightning_module=SimpleNamespace(dtype=torch.float32))
    torch.testing.assert_close(data.on_after_batch_transfer((images, labels), 0)[0], plain)
    data.trainer.training = True
    assert not torch.allclose(data.on_after_batch_transfer((images, labels), 0)[0], plain, atol=0.1)


def test_the_first_images_are_the_same_on_every_rank():
    data = ready(Digits())
    images, labels = data.splits["test"].images, data.splits["test"].labels
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    found = data.first("test", 5)
    assert torch.equal(found[0], images[:5]) and torch.equal(found[1], labels[:5])
    assert len(data.first("test", 1000)[0]) == len(images)


def test_normalised_batches_have_no_mean_and_unit_deviation():
    data = ready(Digits())
    images, _ = data.on_after_batch_transfer((data.splits["train"].images, None), 0)
    assert abs(float(images.mean())) < 2e-3 and abs(float(images.std()) - 1) < 2e-3


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"batch_size": 0}, "data.batch_size .* got 0"),
        ({"batch_size": "many"}, "data.batch_size .* got 'many'"),
        ({"val_size": -0.5}, "data.val_size .* got -0.5"),
        ({"crop": 1.5}, "data.crop .* got 1.5"),
        ({"pad": "white"}, "data.pad must be one of mean, black; got 'white'"),
        ({"augment": "yes"}, "data.augment"),
        ({"image_size": 4}, "data.image_size .* got 4"),
    ],
)
def test_bad_values_are_named(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        Digits(**kwargs)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="batch_size=2000 is more than the 1438"):
        Digits(batch_size=2000).setup()


# --- the official data sets -------------------------------------------------------------------------------------------


def _write(path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def fake_cifar(root, monkeypatch, source, batches, key, classes):
    """Write files of the official layout and make torchvision expect their checksums."""
    rng = np.random.default_rng(0)
    base = root / source.base_folder
    sums = {}
    for name in batches:
        labels = [i % classes for i in range(classes * 2)]
        pixels = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        sums[name] = _write(base / name, pickle.dumps({"data": pixels, key: labels}))
    meta = {source.meta["key"]: [str(i) for i in range(classes)]}
    train = [[n, sums[n]] for n in batches if "test" not in n]
    monkeypatch.setattr(source, "train_list", train)
    monkeypatch.setattr(source, "test_list", [[n, sums[n]] for n in batches if "test" in n])
    md5 = _write(base / source.meta["filename"], pickle.dumps(meta))
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5})
    if source is datasets.CIFAR10:  # CIFAR100 is its subclass
        monkeypatch.setattr(datasets.CIFAR100, "train_list", datasets.CIFAR100.train_list)
    return base


def test_cifar10_is_found_as_it_is(tmp_path, monkeypatch):
    base = fake_cifar(
        tmp_path, monkeypatch, datasets.CIFAR10, ["data_batch_1", "data_batch_2", "test_batch"], "labels", 10
    )
    data = ready(CIFAR10(root=str(tmp_path), batch_size=4))
    assert data.splits["train"].images.shape == (40, 3, 32, 32) and len(data.splits["test"]) == 20
    raw = pickle.loads((base / "data_batch_1").read_bytes())["data"][0].reshape(3, 32, 32)
    assert np.array_equal(data.splits["train"].images[0].numpy(), raw)


def test_other_normalisation():
    data = CIFAR10(mean=[0.5, 0.4, 0.3], std=[0.2, 0.1, 0.25])
    assert data.statistics()["mean"] == [0.5, 0.4, 0.3] and CIFAR10().std == CIFAR10.std != data.std
    pixels = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)  # 0.2
    assert data.transform(pixels)[0, :, 0, 0].tolist() == pytest.approx([-1.5, -2.0, -0.4], rel=1e-5)
    for wrong, words in (({"mean": [0.5]}, "must hold 3 numbers"), ({"std": [0.2, 0.0, 0.2]}, "each of data.std")):
        with pytest.raises(ConfigError, match=words):
            CIFAR10(**wrong)


def test_cifar100(tmp_path, monkeypatch):
    fake_cifar(tmp_path, monkeypatch, datasets.CIFAR100, ["train", "test"], "fine_labels", 100)
    data = ready(CIFAR100(root=str(tmp_path), batch_size=4))
    assert data.num_classes == 100 and data.splits["train"].labels.max() == 99


def test_svhn(tmp_path, monkeypatch):
    from scipy.io import savemat

    for part in ("train", "test"):
        path = tmp_path / f"{part}_32x32.mat"
        labels = np.arange(1, 21).reshape(-1, 1) % 10
        savemat(path, {"X": np.zeros((32, 32, 3, 20), np.uint8), "y": np.where(labels == 0, 10, labels)})
        entry = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
        monkeypatch.setitem(datasets.SVHN.split_list, part, entry)
    data = ready(SVHN(root=str(tmp_path), batch_size=4))
    assert data.splits["train"].images.shape == (20, 3, 32, 32) and not data.flips
    assert data.splits["test"].labels.unique().tolist() == list(range(10))


def test_mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    for part, n in (("train", 20), ("t10k", 10)):
        header = bytes([0, 0, 8, 3, 0, 0, 0, n, 0, 0, 0, 28, 0, 0, 0, 28])
        _write(raw / f"{part}-images-idx3-ubyte", header + bytes(n * 784))
        _write(raw / f"{part}-labels-idx1-ubyte", bytes([0, 0, 8, 1, 0, 0, 0, n, *(i % 10 for i in range(n))]))
    data = ready(MNIST(root=str(tmp_path), batch_size=4))
    assert data.splits["train"].images.shape == (20, 1, 28, 28) and not data.flips


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100, MNIST, SVHN])
def test_missing_files_and_no_network(source, tmp_path, no_network):
    with pytest.raises(DataError, match=r"could not be downloaded: .*Put the official files there.*data=digits"):
        source(root=str(tmp_path)).prepare_data()
    with pytest.raises(DataError, match="download=false"):
        source(root=str(tmp_path), download=False).prepare_data()


def test_a_half_downloaded_set_is_not_used(tmp_path, monkeypatch, no_network):
    base = fake_cifar(tmp_path, monkeypatch, datasets.CIFAR10, ["data_batch_1", "test_batch"], "labels", 10)
    file = base / "data_batch_1"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="CIFAR10 is not complete"):
        CIFAR10(root=str(tmp_path)).prepare_data()


# --- image folders ----------------------------------------------------------------------------------------------------


def test_image_folder(tmp_path):
    data = ready(ImageFolder(root=str(fill(tmp_path)), batch_size=2))
    train = data.splits["train"]
    assert (data.num_classes, data.image_size, data.classes) == (2, 8, ["ant", "bee"])
    assert train.images.shape == (12, 3, 8, 8) and train.labels.tolist() == [0] * 6 + [1] * 6
    assert np.array_equal(train.images[7].permute(1, 2, 0), np.asarray(Image.open(tmp_path / "train/bee/1.png")))
    x = train.images.double() / 255
    assert data.mean == pytest.approx(x.mean((0, 2, 3)).tolist())
    given = ready(ImageFolder(root=data.root, batch_size=2, mean=[0.5, 0.4, 0.3]))
    assert given.mean == (0.5, 0.4, 0.3) and given.std == data.std
    assert data.std == pytest.approx(x.var((0, 2, 3), correction=0).sqrt().tolist())
    assert data.statistics()["classes"] == ["ant", "bee"]


def test_images_are_decoded_once_and_again_when_they_change(tmp_path, monkeypatch):
    root = fill(tmp_path / "images")
    before = ready(ImageFolder(root=str(root), batch_size=2)).splits["train"].images
    monkeypatch.setattr("slimming.data.image_folder.decode", lambda *a: pytest.fail("decoded twice"))
    assert torch.equal(ready(ImageFolder(root=str(root), batch_size=2)).splits["train"].images, before)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.new("RGB", (8, 8), (1, 2, 3)).save(root / "train/ant/0.png")
    assert ready(ImageFolder(root=str(root), batch_size=2)).splits["train"].images[0, :, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("val_size", [0, 0.25])
def test_pixels_are_measured_once(val_size, tmp_path, monkeypatch):
    """Mean and deviation are those of the training images without the held out ones, and lie with the decoded images."""
    root = str(fill(tmp_path / "images"))
    first = ready(ImageFolder(root=root, batch_size=2, val_size=val_size))
    x = first.splits["train"].images.double() / 255
    assert len(x) == 12 - 12 * val_size
    assert first.mean == pytest.approx(x.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert first.std == pytest.approx(x.var((0, 2, 3), correction=0).sqrt().tolist(), rel=1e-12)
    monkeypatch.setattr("slimming.data.image_folder._moments", lambda *a: pytest.fail("measured twice"))
    first.setup("test")
    again = ready(ImageFolder(root=root, batch_size=2, val_size=val_size))
    assert (again.mean, again.std) == (first.mean, first.std)


def test_a_cache_of_images_alone_is_made_again(tmp_path):
    root = str(fill(tmp_path / "images"))
    data = ready(ImageFolder(root=root, batch_size=2))
    old = {k: v for k, v in torch.load(data._cache("train"), weights_only=True).items() if k in ("images", "labels")}
    torch.save(old, data._cache("train"))
    assert ready(ImageFolder(root=root, batch_size=2)).mean == data.mean


def test_a_damaged_cache_is_made_again(tmp_path):
    root = str(fill(tmp_path / "images"))
    data = ready(ImageFolder(root=root, batch_size=2))
    data._cache("train").write_bytes(b"half")
    assert torch.equal(ready(ImageFolder(root=root, batch_size=2)).splits["train"].images, data.splits["train"].images)


def test_images_are_resized_and_cut(tmp_path):
    root = fill(tmp_path, pixels=(20, 10))
    assert ready(ImageFolder(root=str(root), image_size=5, batch_size=2)).splits["test"].images.shape == (8, 3, 5, 5)
    with pytest.raises(DataError, match=r"0.png has 20x10 pixels, others 10x10: set data.image_size"):
        ready(ImageFolder(root=str(root)))


def _one_class(root):
    fill(root, classes=("ant",))


def _other_classes(root):
    fill(root)
    (root / "test" / "bee").rename(root / "test" / "wasp")


def _empty_class(root):
    fill(root)
    for file in (root / "test" / "bee").iterdir():
        file.rename(file.with_suffix(".txt"))


def _no_test(root):
    fill(root)
    (root / "test").rename(root / "tset")


def _broken_image(root):
    fill(root)
    file = root / "train" / "bee" / "3.png"
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_one_class, r"at least two classes are needed, found \['ant'\]"),
        (_other_classes, r"only in train: \['bee'\], only in test: \['wasp'\]"),
        (_empty_class, r"no images .* in test/bee"),
        (_no_test, r"test is not there; the layout is"),
        (_broken_image, r"bee/3.png cannot be read as an image"),
    ],
)
def test_folders_that_cannot_be_used(damage, words, tmp_path):
    damage(tmp_path)
    with pytest.raises(DataError, match=words):
        ready(ImageFolder(root=str(tmp_path), batch_size=2))
    assert not list(tmp_path.rglob("*.tmp*"))


def test_no_root():
    with pytest.raises(DataError, match=r"data\.root must name a folder"):
        ImageFolder()
