"""One short rule per operator: how channels pass through it. Nothing else in the package knows operators.

A rule gets the Tape and the Call and returns the compact atoms of the operator's output (a list for several outputs). It
raises UnsupportedOperator where it cannot prove anything; the watcher then freezes what the operator read. To add an operator,
write a rule in the file of its kind and list it below under its ATen name, without the underscore of the in-place form.
"""

from slimming.channels.rules import constants, elementwise, layers, merging, parts, products, rearranging, space
from slimming.channels.rules.call import Call, Rule

__all__ = ["RULES", "Call"]

_NAMES: dict[Rule, str] = {
    layers.convolution: "conv1d conv2d conv3d",
    layers.transposed_convolution: "conv_transpose1d conv_transpose2d conv_transpose3d",
    layers.linear: "linear",
    layers.batch_norm: "batch_norm",
    layers.index_select: "index_select",
    layers.index_copy: "index_copy",
    elementwise.zero_preserving: "relu relu6 leaky_relu silu hardswish gelu tanh elu selu celu mish softsign abs neg sqrt "
    "square sin erf hardshrink softshrink tanhshrink dropout feature_dropout alpha_dropout clone contiguous to _to_copy "
    "detach alias lift_fresh positive sign round floor nan_to_num",
    elementwise.not_zero_preserving: "sigmoid hardsigmoid exp softplus log_sigmoid cos rsub logical_not",
    elementwise.clamp: "clamp clamp_min clamp_max hardtanh",
    elementwise.power: "pow",
    elementwise.prelu: "prelu",
    elementwise.add: "add sub subtract maximum minimum",
    elementwise.mul: "mul multiply",
    elementwise.div: "div divide true_divide",
    elementwise.type_as: "type_as",
    space.pool: " ".join(space.SPATIAL_AXES)
    + " upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa",
    space.reduce: "mean sum amax amin",
    space.softmax: "softmax log_softmax _softmax",
    space.pad: "pad constant_pad_nd",
    space.pixel_shuffle: "pixel_shuffle",
    space.pixel_unshuffle: "pixel_unshuffle",
    products.matmul: "matmul bmm",
    products.attention: "scaled_dot_product_attention",
    rearranging.rearrange: "view reshape _unsafe_view flatten unflatten permute transpose t unsqueeze squeeze expand movedim "
    "swapaxes flip",
    rearranging.expand_as: "expand_as",
    rearranging.view_as: "view_as reshape_as",
    rearranging.channel_shuffle: "channel_shuffle",
    constants.new_constant: "new_full new_zeros new_ones new_empty",
    constants.meshgrid: "meshgrid",
    merging.concatenate: "cat concat",
    merging.stack: "stack",
    parts.chunk: "chunk",
    parts.split: "split split_with_sizes tensor_split",
    parts.unbind: "unbind",
    parts.slice_channels: "slice",
    parts.select: "select",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
