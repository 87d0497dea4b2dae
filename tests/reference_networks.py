"""Networks as the reference implementations in PyTorch define them, pruned in their way; written anew from their layout."""

import torch
from torch import nn
from torch.nn import functional as F


class Select(nn.Module):
    """Passes on the channels whose entry in `indexes` is not 0."""

    def __init__(self, channels: int):
        super().__init__()
        self.indexes = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x[:, self.indexes.nonzero().flatten()]


def mask(channels: int, pruned: bool) -> torch.Tensor:
    chosen = torch.rand(channels) < 0.6 if pruned else torch.ones(channels, dtype=torch.bool)
    chosen[0] = True
    return chosen


class Reading(nn.Module):
    """BatchNorm, selection, ReLU: the whole BatchNorm stays, `indexes` says what goes on."""

    def add(self, channels: int, pruned: bool, name: str = "bn1") -> int:
        self.add_module(name, nn.BatchNorm2d(channels))
        self.select = Select(channels)
        self.select.indexes.data = mask(channels, pruned).float()
        return int(self.select.indexes.sum())

    def read(self, x, name: str = "bn1"):
        return F.relu(self.select(getattr(self, name)(x)))


class Bottleneck(Reading):
    def __init__(self, inplanes: int, planes: int, stride: int, pruned: bool):
        super().__init__()
        widths = [self.add(inplanes, pruned), *(int(mask(planes, pruned).sum()) for _ in range(2))]
        self.conv1 = nn.Conv2d(widths[0], widths[1], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[1])
        self.conv2 = nn.Conv2d(widths[1], widths[2], 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(widths[2])
        self.conv3 = nn.Conv2d(widths[2], planes * 4, 1, bias=False)
        self.downsample = None
        if stride != 1 or inplanes != planes * 4:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes * 4, 1, stride, bias=False))

    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(self.read(x)))))
        out = self.conv3(F.relu(self.bn3(out)))
        return out + (x if self.downsample is None else self.downsample(x))


class ResNet(Reading):
    def __init__(self, depth: int, pruned: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        inplanes = 16
        for stage, planes in enumerate((16, 32, 64)):
            blocks = []
            for i in range((depth - 2) // 9):
                blocks.append(Bottleneck(inplanes, planes, 2 if stage and not i else 1, pruned))
                inplanes = planes * 4
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(self.add(inplanes, pruned, "bn"), 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.avg_pool2d(self.read(x, "bn"), 8).flatten(1))


class Basic(Reading):
    def __init__(self, inplanes: int, growth: int, pruned: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(self.add(inplanes, pruned), growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat((x, self.conv1(self.read(x))), 1)


class Transition(Reading):
    def __init__(self, inplanes: int, pruned: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(self.add(inplanes, pruned), inplanes, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv1(self.read(x)), 2)


class DenseNet(Reading):
    def __init__(self, depth: int, growth: int, pruned: bool):
        super().__init__()
        inplanes = growth * 2
        self.conv1 = nn.Conv2d(3, inplanes, 3, padding=1, bias=False)
        for stage in range(3):
            layers = []
            for _ in range((depth - 4) // 3):
                layers.append(Basic(inplanes, growth, pruned))
                inplanes += growth
            self.add_module(f"dense{stage + 1}", nn.Sequential(*layers))
            if stage < 2:
                self.add_module(f"trans{stage + 1}", Transition(inplanes, pruned))
        self.fc = nn.Linear(self.add(inplanes, pruned, "bn"), 10)

    def forward(self, x):
        x = self.trans2(self.dense2(self.trans1(self.dense1(self.conv1(x)))))
        return self.fc(F.avg_pool2d(self.read(self.dense3(x), "bn"), 8).flatten(1))


class VGG(nn.Module):
    def __init__(self, cfg: list):
        super().__init__()
        layers, channels = [], 3
        for v in cfg:
            if v == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, v, 3, padding=1, bias=False), nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
                channels = v
        self.feature = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x):
        return self.classifier(F.avg_pool2d(self.feature(x), 2).flatten(1))


def shake(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value of its own, as a training would."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "indexes" not in name and tensor.is_floating_point():
            tensor.data += 0.3 * torch.rand_like(tensor)
    return model.eval()
