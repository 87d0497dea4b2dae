"""Which score decides best: the validation accuracy of many prunings of one checkpoint, each repaired and not trained.

python benchmarks/scores.py sparse/last.ckpt macs=0.3,0.4 gamma@0.9 lamp reconstruction reconstruction/macs

A score may be followed by /macs (per=macs) and @R (max_layer_ratio=R); `ratio=0.7` prunes by the share of the channels instead.
The checkpoint's training must have held out a validation split. Accuracies are measured in bfloat16.
"""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import slimming
from slimming import checkpoint
from slimming.channels.options import MEASURED
from slimming.data import ImageData
from slimming.stages.building import build_data
from slimming.stages.scoring import scoring_batches

CPU = torch.device("cpu")


def accuracy(model: nn.Module, data: ImageData) -> float:
    """Return the share of the validation images that a network gets right, in per cent."""
    right = count = 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for images, labels in data.val_dataloader():
            right += int((model(data.transform(images)).argmax(1) == labels).sum())
            count += len(labels)
    return 100 * right / count


def criteria(text: str) -> Iterable[slimming.Budget | slimming.GlobalRatio]:
    key, _, values = text.partition("=")
    for value in values.split(","):
        yield slimming.Budget(macs=float(value)) if key == "macs" else slimming.GlobalRatio(float(value))


def main(path: str, asked: str, *scores: str) -> None:
    saved = checkpoint.read(path)
    model, data = checkpoint.rebuild(saved, None).eval(), build_data(saved.record.config["data"])
    data.prepare_data()
    data.setup()
    batches = scoring_batches(MEASURED[0], data, CPU, torch.float32)
    images = torch.cat(batches)[:2000]
    graph, known = slimming.trace(model, images[:1]), dict[str, dict[str, Tensor]]()
    print(f"not pruned: {accuracy(model, data):.2f}% of {len(data.splits['val'])} validation images", flush=True)
    for criterion in criteria(asked):
        for label in scores:
            named, _, limit = label.partition("@")
            score, _, per = named.partition("/")
            if score not in known:
                values = graph.scores(score, batches=batches)
                known[score] = {name: values[norm.all] for name, norm in graph.norms.items()}
            options = {"per": per or "channel", "max_layer_ratio": float(limit or 1)}
            plan = graph.plan(criterion, score=known[score], **options)
            thin = slimming.repair(model, slimming.prune(model, plan), plan, [images])
            got = plan.got
            shares = (
                f"{got['ratio']:.1%} removed, {got['macs']:.1%} of the MACs and {got['params']:.1%} of the weights left"
            )
            print(f"{plan.asked} {label}: {shares}; {accuracy(thin, data):.2f}%", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
