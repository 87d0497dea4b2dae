"""Channels split, sliced, stacked and multiplied: sizes in attributes follow, whatever cannot is left alone."""

import pytest
import torch
from exactness import assert_exact, randomise
from test_operators import check, conv_bn, net
from torch import nn
from torch.nn import functional as F

import slimming
from slimming import models
from slimming.channels.sizes import Given, Size, match, new_values
from slimming.errors import PlanError

IMAGE = torch.randn(1, 3, 8, 8, dtype=torch.float64)


def res2net():
    """Equal parts of a width that an attribute holds."""

    def forward(self, x):
        parts = torch.split(F.relu(self.a(x)), self.width, 1)
        y = F.relu(self.b(parts[0]))
        z = F.relu(self.c(y + parts[1]))
        return self.head(torch.cat((y, z, parts[2]), 1))

    layers = {"a": conv_bn(3, 24), "b": conv_bn(8, 8), "c": conv_bn(8, 8), "head": nn.Conv2d(24, 2, 1)}
    return net(layers | {"width": 8}, forward)


def ghost():
    """A slice up to an attribute, written to in place."""

    def forward(self, x):
        primary = F.relu(self.a(x))
        x = torch.cat((primary, self.b(primary)), 1)[:, : self.channels]
        x += self.shortcut(primary)
        return self.head(F.relu(x))

    layers = {"a": conv_bn(3, 8), "b": conv_bn(8, 8), "shortcut": conv_bn(8, 12), "head": nn.Conv2d(12, 2, 1)}
    return net(layers | {"channels": 12}, forward)


def csp():
    """Halves of an attribute: arithmetic is followed."""

    def forward(self, x):
        x = F.relu(self.a(x))
        x, y = x.split(self.expanded // 2, dim=1)
        return self.head(torch.cat((F.relu(self.b(x)), y), 1))

    return net({"a": conv_bn(3, 16), "b": conv_bn(8, 8), "head": nn.Conv2d(16, 2, 1), "expanded": 16}, forward)


def branches_by_two_attributes():
    """As SelectiveKernel: the channels of a branch are the quotient of two attributes; branches meet by a softmax."""

    def forward(self, x):
        x = F.relu(self.stem(x))
        parts = torch.split(x, self.channels // self.paths, 1)
        x = torch.stack([F.relu(self.a(parts[0])), F.relu(self.b(parts[1]))], 1)
        squeezed = F.relu(self.squeeze(x.sum(1).mean((2, 3), keepdim=True)))
        weights = self.excite(squeezed)
        b, c, h, w = weights.shape
        weights = weights.view(b, self.paths, c // self.paths, h, w).softmax(1)
        return self.head((x * weights).sum(1))

    layers = {"stem": conv_bn(3, 16), "a": conv_bn(8, 12), "b": conv_bn(8, 12), "squeeze": nn.Conv2d(12, 4, 1)}
    layers |= {"excite": nn.Conv2d(4, 24, 1), "head": nn.Conv2d(12, 2, 1), "channels": 16, "paths": 2}
    return net(layers, forward)


def mixed():
    """Unequal parts of sizes in a list, two of them equal."""

    def forward(self, x):
        parts = torch.split(F.relu(self.a(x)), self.sizes, 1)
        return self.head(torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], 1))

    layers = nn.ModuleList([conv_bn(n, n) for n in (8, 6, 6)])
    return net({"a": conv_bn(3, 20), "layers": layers, "head": nn.Conv2d(20, 2, 1), "sizes": [8, 6, 6]}, forward)


def difference():
    """As SHViT: [part, channels - part]."""

    def forward(self, x):
        x = F.relu(self.a(x))
        x, y = torch.split(x, [self.part, self.channels - self.part], dim=1)
        return self.head(torch.cat((F.relu(self.b(x)), y), 1))

    layers = {"a": conv_bn(3, 16), "b": conv_bn(6, 6), "head": nn.Conv2d(16, 2, 1), "part": 6, "channels": 16}
    return net(layers, forward)


def shaped_like_another():
    """The size of one tensor is written into the view of another: both keep one width."""

    def forward(self, x):
        x = F.relu(self.a(x))
        b, c, h, w = x.shape
        y = self.b(x).flatten(2).view(b, c, h, w)
        return self.head(F.relu(y))

    return net({"a": conv_bn(3, 8), "b": conv_bn(8, 8), "head": nn.Conv2d(8, 2, 1)}, forward)


def blurred():
    """A depthwise convolution by a buffer, its groups an attribute."""

    def forward(self, x):
        x = F.conv2d(F.relu(self.a(x)), self.kernel, padding=1, groups=self.channels)
        return self.head(F.relu(self.b(x)))

    model = net({"a": conv_bn(3, 8), "b": conv_bn(8, 8), "head": nn.Conv2d(8, 2, 1), "channels": 8}, forward)
    model.register_buffer("kernel", torch.ones(8, 1, 3, 3) / 9)
    return model


def layer_scale():
    """Parameters with one number per channel, as they are and viewed; slopes per channel."""

    def forward(self, x):
        x = self.prelu(self.a(x))
        x = x + self.first * self.b(x)
        return self.head(F.relu(x + self.second.view(1, -1, 1, 1) * self.c(x)))

    layers = {"a": conv_bn(3, 8), "b": conv_bn(8, 8), "c": conv_bn(8, 8), "head": nn.Conv2d(8, 2, 1)}
    layers |= {"prelu": nn.PReLU(8), "first": nn.Parameter(torch.rand(8, 1, 1)), "second": nn.Parameter(torch.rand(8))}
    return net(layers, forward)


def attention(fused, scale=0.5, per_head=4):
    """Queries and keys are summed over, values carried; heads keep equal widths."""

    def forward(self, x):
        x = F.relu(self.a(x))
        b, _, h, w = x.shape
        q, k, v = self.qkv(x).view(b, self.heads, -1, h * w).split([self.key, self.key, self.value], dim=2)
        if fused:
            q, k, v = (t.transpose(-2, -1) for t in (q, k, v))
            x = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(-2, -1)
        else:
            x = v @ (q.transpose(-2, -1) @ k * 0.5).softmax(-1).transpose(-2, -1)
        return self.head(F.relu(x.reshape(b, -1, h, w)))

    width = 2 * (2 * per_head + 6)
    layers = {"a": conv_bn(3, 8), "qkv": conv_bn(8, width), "head": nn.Conv2d(12, 2, 1)}
    return net(layers | {"heads": 2, "key": per_head, "value": 6}, forward)


def zero_added():
    """A sum that begins with the number 0, as in re-parameterised blocks."""

    def forward(self, x):
        x = F.relu(self.a(x))
        total = 0.0
        for branch in (self.b, self.c, self.d):
            total = total + branch(x)
        return self.head(F.relu(total))

    layers = {"a": conv_bn(3, 8), "b": conv_bn(8, 8), "c": nn.BatchNorm2d(8), "head": nn.Conv2d(8, 2, 1)}
    return net(layers | {"d": conv_bn(8, 8, groups=8)}, forward)


def summed_over_channels():
    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(x * x.sum(1, keepdim=True).sigmoid())

    return net({"a": conv_bn(3, 8), "head": nn.Conv2d(8, 2, 1)}, forward)


WHOLE = [res2net, ghost, csp, branches_by_two_attributes, mixed, difference, shaped_like_another, blurred, layer_scale]
WHOLE += [lambda: attention(False), lambda: attention(True), zero_added, summed_over_channels]
NAMES = [f.__name__ for f in WHOLE[:9]] + ["attention", "fused_attention", "zero_added", "summed_over_channels"]


@pytest.mark.parametrize("make", WHOLE, ids=NAMES)
def test_every_gamma_may_be_chosen_and_the_result_is_exact(make):
    graph = check(make(), IMAGE)
    assert graph.unknown == [] and graph.shares()["together"] == graph.shares()["apart"] == 1


@pytest.mark.parametrize(
    "make", [res2net, mixed, csp, difference, branches_by_two_attributes], ids=lambda f: f.__name__
)
def test_a_pruned_network_is_pruned_again(make):
    model = randomise(make())
    for _ in range(2):
        plan = slimming.trace(model, IMAGE).plan(slimming.GlobalRatio(0.4), ties="apart")
        model = assert_exact(model, plan, IMAGE)


def test_slopes_per_channel_shrink_with_what_they_say_of_themselves():
    model = randomise(layer_scale())
    thin = slimming.prune(model, slimming.trace(model, IMAGE).plan(slimming.GlobalRatio(0.5)))
    assert thin.prelu.num_parameters == len(thin.prelu.weight) == thin.a[0].out_channels < 8


def test_the_plan_says_which_attributes_change_and_survives_json():
    model = randomise(mixed())
    plan = slimming.trace(model, IMAGE).plan(slimming.GlobalRatio(0.5), ties="apart", score="random")
    again = slimming.PruningPlan.from_json(plan.to_json())
    assert plan.attributes and all(name == "sizes" for _, name, _, _ in plan.attributes) and "sizes" in plan.describe()
    thin = slimming.prune(model, again)
    assert sum(thin.sizes) == thin.a[0].out_channels < 20 == sum(model.sizes)


def test_the_attention_scale_that_counts_channels_keeps_queries_and_keys():
    graph = check(attention(True, scale=None), IMAGE, ties=("apart",))
    assert any("its scale counts the channels" in reason for reason in graph.unknown)


def test_a_view_that_was_overwritten_is_not_trusted():
    def forward(self, x):
        x = F.relu(self.a(x))
        first, rest = x[:, : self.part], x[:, self.part :]
        first += self.b(rest)
        return self.head(x)  # reads what was written through the view

    layers = {"a": conv_bn(3, 8), "b": conv_bn(4, 4), "head": nn.Conv2d(8, 2, 1), "part": 4}
    graph = check(net(layers, forward), IMAGE, ties=("apart",), shrinks=False)
    assert any("overwritten" in reason for reason in graph.unknown)


@pytest.mark.parametrize(
    "attributes", [[["", "width", None, -1]], [["", "width"]], [["", 3, None, 4]], [["", "w", "0", 4]]]
)
def test_malformed_attributes_of_a_plan(attributes):
    model = randomise(res2net())
    data = slimming.trace(model, IMAGE).plan(slimming.GlobalRatio(0.5)).to_dict()
    with pytest.raises(PlanError, match="attributes must be"):
        slimming.PruningPlan.from_dict(data | {"attributes": attributes})


@pytest.mark.parametrize("attribute", [["", "nothing", None, 4], ["", "training", None, 4], ["a", "width", None, 4]])
def test_a_plan_sets_nothing_but_sizes(attribute):
    model = randomise(res2net())
    data = slimming.trace(model, IMAGE).plan(slimming.GlobalRatio(0.5)).to_dict()
    with pytest.raises(PlanError, match="is not a size in this network"):
        slimming.prune(model, slimming.PruningPlan.from_dict(data | {"attributes": [attribute]}))


def test_plans_of_format_1_still_load():
    model = randomise(models.vgg(11, widths=[4, "M", 6]))
    plan = slimming.trace(model, IMAGE).plan(slimming.GlobalRatio(0.5))
    old = plan.to_dict() | {"format": 1}
    del old["attributes"]
    thin, again = (slimming.prune(model, p) for p in (plan, slimming.PruningPlan.from_dict(old)))
    assert torch.equal(thin(IMAGE), again(IMAGE))


def test_sizes_remember_what_they_are_made_of():
    module = net({"a": 12, "b": [3, 5]}, None)
    a, b0 = Size.of(("", "a", None), 12), Size.of(("", "b", 0), 3)
    assert (a // 2, 2 * a, a - b0, 30 - a) == (6, 24, 9, 18) and (a // b0).made_of == a.made_of | b0.made_of
    assert new_values([(a // 2, 4)], module) == {("", "a", None): 8}
    assert new_values([(a - b0, 5), (b0, 2)], module) == {("", "a", None): 7, ("", "b", 0): 2}
    assert new_values([(a // b0, 2)], module) == {("", "a", None): 6}  # the larger one follows
    assert new_values([(a, 12), (a // 2, 6)], module) == {}
    with pytest.raises(ValueError, match="two values"):
        new_values([(a, 5), (a // 2, 6)], module)


def test_equal_numbers_are_told_apart_by_their_place_or_their_number():
    first, second = Size.of(("", "x", None), 4), Size.of(("", "y", None), 4)
    assert match([4, 7, 4], Given(sizes=[first, second])) == [first, None, second]
    assert [s and s.made_of for s in match([4, 4, 4], Given(sizes=[first, second]))] == [None, None, None]
    assert [s and s.made_of for s in match([4, 4], Given([[4, second]], [second]))] == [None, second.made_of]
