"""Numbers that others have published, shown beside one's own where network and data set are the same."""

PAPER = "Liu et al., arXiv:1708.06519, Table 1"
REFERENCE = "PyTorch reference implementation"
OTHER = "another public run"
DENSE = {"vgg19": 20_035_018, "preresnet164": 1_703_258, "densenet40": 1_019_722}  # our counts at 10 classes

# (network, data) -> (source, setting, baseline, right after pruning, fine-tuned: accuracies in %, remark)
PUBLISHED: dict[tuple[str, str], list[tuple[str, str, float | None, float | None, float | None, str]]] = {
    ("vgg19", "cifar10"): [
        (PAPER, "70%", 93.66, None, 93.80, "2.30M parameters, FLOPs -51.0%"),
        (REFERENCE, "70%", 93.77, 32.54, 93.78, ""),
        (OTHER, "70%", 93.26, 10.00, 92.64, "2.45M parameters; sparse 94.02"),
        (OTHER, "10 ... 70%", 93.26, None, None, "not fine-tuned: 93.93 93.96 93.95 94.01 94.03 94.05 93.01"),
        (OTHER, "70%", 92.07, None, 91.40, "2.25M parameters; sparse 92.17"),
    ],
    ("preresnet164", "cifar10"): [
        (PAPER, "40%", 94.58, None, 94.92, ""),
        (PAPER, "60%", 94.58, None, 94.73, ""),
        (REFERENCE, "60%", 94.75, 47.73, 93.81, ""),
    ],
    ("densenet40", "cifar10"): [
        (PAPER, "40%", 93.89, None, 94.81, ""),
        (PAPER, "70%", 93.89, None, 94.35, ""),
        (REFERENCE, "60%", 94.11, 89.46, 94.22, ""),
    ],
}


def published_for(model: str, data: str | None, num_params: int | None) -> list[tuple]:
    """Return the published rows for a network at its full width; [] for another network or data set."""
    expected = DENSE.get(model)
    if not expected or not num_params or abs(num_params / expected - 1) > 0.05:
        return []
    return PUBLISHED.get((model, str(data)), [])
