"""Rules of operators over space: pooling, resizing, sums along axes, padding, pixel shuffles."""

from torch import Tensor

from slimming.channels.atoms import along, frozen, varying
from slimming.channels.rules.call import Call
from slimming.channels.rules.elementwise import not_zero_preserving
from slimming.channels.tape import Product, Tape, UnsupportedOperator

SPATIAL_AXES = {f"{kind}{d}d": d for d in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool")}
SPATIAL_AXES |= {f"adaptive_max_pool{d}d": d for d in (1, 2, 3)} | {f"max_pool{d}d_with_indices": d for d in (2, 3)}
SPATIAL_AXES |= {"upsample_linear1d": 1, "upsample_nearest1d": 1, "upsample_trilinear3d": 3, "upsample_nearest3d": 3}


def pool(tape: Tape, call: Call) -> Tensor | list[Tensor]:
    """Pooling and resizing: channels lie along axis 1 (0 without a batch); only later axes are mixed."""
    call.only_first()
    if max(varying(call.x), default=0) > max(0, call.args[0].ndim - SPATIAL_AXES.get(call.name, 2) - 1):
        raise UnsupportedOperator("its channels lie along a spatial axis")
    return [call.x, call.x] if isinstance(call.out, tuple) else call.x


def reduce(tape: Tape, call: Call) -> Tensor:
    """Mean, sum or extreme over space or over branches; it is zero where everything that it combines is."""
    x, axes = call.args[0], call.arg(1, "dim")
    axes = [axes] if isinstance(axes, int) else list(axes or range(x.ndim))
    axes = [axis % x.ndim for axis in axes]
    atoms, met = call.x, set(axes) & set(varying(call.x))
    if met and tape.flexible(atoms) in met:
        if call.name != "sum" or len(varying(atoms)) > 1:
            raise UnsupportedOperator("it runs over channels")
        tape.products.append(Product(atoms.reshape(-1), 0, sums=True))
        atoms = frozen(x.ndim)
    elif met:
        parts = [atoms]
        for axis in met:
            parts = [piece for part in parts for piece in part.split(1, axis)]
        atoms = tape.derived("all", parts[0].shape, parts)
    if call.out.ndim == x.ndim:
        return atoms
    return atoms.view([size for axis, size in enumerate(atoms.shape) if axis not in axes])


def softmax(tape: Tape, call: Call) -> Tensor:
    if call.axis(1) == tape.flexible(call.x):
        raise UnsupportedOperator("it runs over channels")
    return not_zero_preserving(tape, call)


def pad(tape: Tape, call: Call) -> Tensor:
    """Padding of space. The amounts of a padding of channels are written into forward, so that is not supported."""
    amounts = call.args[1]
    axes = {call.args[0].ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    if axes & set(varying(call.x)):
        raise UnsupportedOperator("it pads channels by amounts written into forward")
    if call.name == "pad":
        mode, value = call.arg(2, "mode", "constant"), call.arg(3, "value")
    else:
        mode, value = "constant", call.arg(2, "value", 0)
    return call.x if mode != "constant" or not value else tape.derived("never", call.x.shape, [call.x])


def pixel_shuffle(tape: Tape, call: Call) -> Tensor:
    """C * r * r channels become C: the r * r that meet in one must go together."""
    atoms, r = call.channels(call.args[0], -3), call.args[1]
    grid = atoms.view(-1, r * r)
    return along(tape.derived("all", (len(grid),), list(grid.T)), -3, call.out.ndim)


def pixel_unshuffle(tape: Tape, call: Call) -> Tensor:
    """C channels become C * r * r, which stay or go with the one they come from."""
    atoms, r = call.channels(call.args[0], -3), call.args[1]
    return along(atoms.repeat_interleave(r * r), -3, call.out.ndim)
