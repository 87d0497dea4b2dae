"""Checkpoints of the public PyTorch reference give the same outputs as the reference' own networks."""

import math
import pickle

import numpy as np
import pytest
import torch

import reference_networks as reference_net
from slimming import models, reference
from slimming.channels.layers import SelectBatchNorm
from slimming.channels.surgery import prune
from slimming.errors import CheckpointError

WIDTHS = [49, 64, "M", 128, 128, "M", 256, 256, 249, 208, "M", 116, 38, 18, 8, "M", 14, 9, 16, 94]
CASES = {
    "vgg19": (
        lambda pruned: reference_net.VGG(WIDTHS if pruned else models.vgg.__globals__["WIDTHS"][19]),
        lambda: models.vgg(),
    ),
    "resnet": (lambda pruned: reference_net.ResNet(20, pruned), lambda: models.preresnet(depth=20)),
    "densenet": (
        lambda pruned: reference_net.DenseNet(22, 12, pruned),
        lambda: models.densenet(depth=22, growth=12, init_channels=24),
    ),
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_outputs(name, pruned, prefix, tmp_path):
    torch.manual_seed(0)
    theirs = reference_net.shake(CASES[name][0](pruned)).double()
    path = tmp_path / "model_best.pth.tar"
    state = {prefix + k: v for k, v in theirs.state_dict().items()}
    torch.save({"cfg": [1], "epoch": 3, "best_prec1": torch.tensor(0.93), "state_dict": state}, path)
    weights = reference.read(path)
    assert reference.io_shape(weights) == {"num_classes": 10, "in_channels": 3}
    dense = CASES[name][1]().double()
    example = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    ours, plans = reference.convert(weights, dense, example, path)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = theirs(images)
    assert float((ours(images) - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
    assert len(plans) == pruned
    count = sum(p.numel() for p in ours.parameters())
    if not pruned:
        assert count == sum(p.numel() for n, p in theirs.named_parameters() if "indexes" not in n)
    elif name == "vgg19":
        assert count == 2_460_793  # the reference's own count for these widths
    else:
        assert count < sum(p.numel() for n, p in theirs.named_parameters() if "indexes" not in n)
        assert any(isinstance(m, SelectBatchNorm) for m in ours.modules())
    for plan in plans:  # as slimming.load would: the architecture from the plans, the weights from the file
        again = prune(CASES[name][1]().double(), plan, verify=False)
        again.load_state_dict(ours.state_dict())
        assert torch.equal(again.eval()(images), ours(images))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_numpy_scalars_of_older_ports_are_read(kind, tmp_path):
    path = tmp_path / "old.pth.tar"
    state = reference_net.VGG([4, "M", 4]).state_dict()
    torch.save({"best_prec1": kind(3), "state_dict": state}, path, _use_new_zipfile_serialization=False)
    assert reference.read(path).keys() == state.keys()


class Evil:
    def __reduce__(self):
        return math.factorial, (3,)


def test_code_beside_the_weights_is_refused(tmp_path):
    path = tmp_path / "evil.pth.tar"
    torch.save({"state_dict": reference_net.VGG([4]).state_dict(), "args": Evil()}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        reference.read(path)
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(CheckpointError):
        reference.read(path)


@pytest.mark.parametrize("content", [{"state_dict": {"a": 1}}, {"state_dict": {"a.weight": torch.zeros(2)}}, [1], {}])
def test_other_files_are_not_taken_for_a_port(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    assert reference.read(tmp_path / "x.pt") is None


@pytest.mark.parametrize(
    ("dense", "words"),
    [
        (lambda: models.vgg(depth=16), r"lacks|also has feature"),
        (lambda: models.vgg(width=0.5), r"feature\.\d+.weight is \(49|64, 3, 3, 3\) there"),
        (lambda: models.preresnet(depth=20), "lacks bn.bias"),
    ],
)
def test_another_network_is_named(dense, words, tmp_path):
    weights = reference_net.VGG(WIDTHS).state_dict()
    with pytest.raises(CheckpointError, match=words):
        reference.convert(weights, dense(), torch.zeros(1, 3, 32, 32), "x.pth.tar")
