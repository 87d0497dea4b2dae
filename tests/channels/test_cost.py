"""MACs against closed forms; against torch's own counter in tests/models."""

import torch
from torch import nn
from torch.nn import functional as F

from slimming.channels.cost import cost


def test_convolutions_and_linear_layers():
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),  # 8x8 -> 4x4
        nn.ConvTranspose2d(6, 3, 2, stride=2),  # 4x4 -> 8x8
        nn.Flatten(),
        nn.Linear(3 * 64, 5),
    )
    counted = cost(net, torch.zeros(3, 4, 8, 8))
    assert counted.layers == {"0": 16 * 6 * 2 * 9, "1": 16 * 6 * 3 * 4, "3": 192 * 5}
    assert counted.macs == sum(counted.layers.values()) and counted.flops == 2 * counted.macs
    assert counted.activation_bytes == 4 * (6 * 16 + 3 * 64 + 5)  # the flattening is a view
    assert counted.layer_params == {"0": 6 * 2 * 9 + 6, "1": 6 * 3 * 4 + 3, "3": 192 * 5 + 5}
    assert counted.num_params == (6 * 2 * 9 + 6) + (6 * 3 * 4 + 3) + (192 * 5 + 5)


def test_functional_calls_shared_layers_and_products_of_activations():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x):  # (N, T, 4)
            x = self.fc(self.fc(F.linear(x, self.weight)))
            return x @ x.transpose(1, 2) @ x

    counted = cost(Net(), torch.zeros(2, 5, 4))
    assert counted.layers == {"": 5 * 16 + 2 * (5 * 5 * 4), "fc": 2 * (5 * 16)}


def test_the_model_is_left_as_it_is():
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    cost(net, torch.randn(4, 2, 7))
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
