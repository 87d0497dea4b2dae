"""What `export.py` prints."""

from typing import Any


def summary(facts: dict[str, Any]) -> str:
    """Say what was written, how it was proven, and what it gives."""
    parity, accuracy = facts["parity"], facts["accuracy"]
    opset = f", opset {facts['opset']}" * bool(facts["opset"])
    shapes = [f"{facts[key]['name']} ({', '.join(map(str, facts[key]['shape']))})" for key in ("input", "output")]
    before = "before its quantisation " * bool(facts["quantize"])
    lines = [
        f"{' and '.join(facts['files'])}: {facts['size_bytes'] / 1e6:.2f} MB{opset}; {' -> '.join(shapes)}",
        f"{before}proven in a fresh process on {parity['images']:,} images ({parity['of']}): "
        f"the {facts['output']['name']} differ by {parity['relative']:.1e} of the largest (allowed: {parity['allowed']:.0e})",
    ]
    if accuracy:
        kind = "in int8" if facts["quantize"] else "exported"
        lines += [f"test accuracy: {accuracy['test/acc_before']:.2%} -> {accuracy['test/acc']:.2%} {kind}"]
    return "\n".join(lines)
