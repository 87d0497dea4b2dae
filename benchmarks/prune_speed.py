"""trace + plan + prune (without the proof) against torch-pruning's BNScalePruner, on one core, with exactness side by side.

    pip install torch-pruning
    python benchmarks/prune_speed.py [--only REGEX] [--repeats 5]

Every network gets random BatchNorms of which 40% are planted dead (gamma = beta = 0), independently per layer, and both
tools are asked to remove 40%. Columns: median seconds of ours and theirs, taking turns (theirs until it has had 2 s), each
leaving the dense network as it is (theirs prunes in place and so is given a copy), and the median ratio of the turns; the
largest difference between prune and mask at 40% (float64, relative to the largest output); how far the output moves although
only dead channels need to go (ours: Threshold(1e-6), ties apart); whether each thin network still runs in train mode
(ours / theirs).
"""

import argparse
import copy
import gc
import re
import signal
import statistics
import time
import warnings

import torch
from torch import nn
from torchvision import models as zoo

import slimming
from slimming import models
from slimming.channels.inputs import call_model, tensors_in
from slimming.channels.modes import set_training
from slimming.channels.proof import relative_difference

WITHOUT_BATCHNORM = re.compile("alexnet|convnext|squeezenet|swin|vit_|vgg[0-9]+$")
SIZES = {"maxvit_t": 224, "inception_v3": 299}
LIMIT_S = 100  # for one pruning by the other tool
HUGE = 200_000_000  # parameters; above, exactness is checked in float32, for the sake of memory
DETECTION = {
    "fasterrcnn_resnet50_fpn": {"min_size": 64, "max_size": 64},
    "ssdlite320_mobilenet_v3_large": {},
}


def build(name: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    if name in DETECTION:
        build = getattr(zoo.detection, name)
        model = build(weights=None, weights_backbone=None, **DETECTION[name])
        example: object = ([torch.rand(3, 64, 64)],)
    elif name.startswith(("preresnet", "densenet40")):
        kind, depth = re.match(r"([a-z]+)(\d+)", name).groups()
        model, example = models.build(kind, depth=int(depth)), torch.randn(1, 3, 64, 64)
    else:
        told = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = SIZES.get(name, 64)
        model, example = zoo.get_model(name, weights=None, **told), torch.randn(1, 3, size, size)
    return plant(model).eval(), example


def plant(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            n = norm.num_features
            norm.weight.copy_(0.5 + torch.rand(n, generator=generator))
            norm.bias.copy_(0.1 * torch.randn(n, generator=generator))
            norm.running_mean.copy_(0.1 * torch.randn(n, generator=generator))
            dead = torch.randperm(n, generator=generator)[: int(0.4 * n)]
            norm.weight[dead] = norm.bias[dead] = 0
    return model


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return type(value)(double(v) for v in value)


def outputs(model: nn.Module, example) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t.double() for t in tensors_in(call_model(model.eval(), example)) if t.is_floating_point()]


def trains(model: nn.Module, example) -> str:
    if not isinstance(example, torch.Tensor):
        return "-"
    try:
        set_training(model)(torch.cat((example, example)))
        return "yes"
    except Exception:
        return "NO"


def time_ours(model, example) -> tuple[float, nn.Module]:
    start = time.perf_counter()
    graph = slimming.trace(model, example)
    thin = slimming.prune(model, graph.plan(slimming.GlobalRatio(0.4)), verify=False)
    return time.perf_counter() - start, thin


def time_theirs(model, example) -> tuple[float, nn.Module]:
    """Raises whatever it crashes with, or TimeoutError."""
    import torch_pruning as tp

    start = time.perf_counter()
    thin = copy.deepcopy(model)  # it prunes in place; both are to leave the network as it is
    heads = [m for m in thin.modules() if isinstance(m, nn.Linear) and m.out_features in (10, 1000)]
    signal.alarm(LIMIT_S)
    try:
        importance = tp.importance.BNScaleImportance()
        options = {"pruning_ratio": 0.4, "global_pruning": True, "ignored_layers": heads}
        tp.pruner.BNScalePruner(thin, example, importance=importance, **options).step()
        return time.perf_counter() - start, thin
    finally:
        signal.alarm(0)


def race(model, example, repeats: int) -> dict:
    """Let both take turns; the other tool stops taking part when it crashes or has taken 2 s."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    result = {"theirs": "-", "trains, theirs": "-", "ratio": "-", "change, theirs": "not run"}
    before = outputs(model, example)
    taking_part = isinstance(example, torch.Tensor)
    time_ours(model, example)  # warm-up
    for _ in range(repeats):
        gc.collect()
        seconds, thin = time_ours(model, example)
        times["ours"].append(seconds)
        result["trains, ours"] = trains(thin, example)
        if taking_part and sum(times["theirs"]) < 2:
            gc.collect()
            try:
                seconds, thin = time_theirs(model, example)
            except TimeoutError:
                taking_part, result["change, theirs"] = False, f"not done in {LIMIT_S} s"
                continue
            except Exception as error:
                taking_part, result["change, theirs"] = False, f"crashes ({type(error).__name__})"
                continue
            times["theirs"].append(seconds)
            result["change, theirs"] = f"{relative_difference(outputs(thin, example), before):.0%}"
            result["trains, theirs"] = trains(thin, example)
    result["ours"] = f"{statistics.median(times['ours']):.3f}"
    if times["theirs"]:
        result["theirs"] = f"{statistics.median(times['theirs']):.3f}"
        result["ratio"] = (
            f"{statistics.median(b / a for a, b in zip(times['ours'], times['theirs'], strict=False)):.1f}"
        )
    return result


def check_ours(model, example) -> dict:
    if sum(p.numel() for p in model.parameters()) < HUGE:
        model, example = copy.deepcopy(model).double(), double(example)
    graph = slimming.trace(model, example)
    plan = graph.plan(slimming.GlobalRatio(0.4))
    planted = graph.plan(slimming.Threshold(1e-6), ties="apart")
    if plan.compare == "layers":  # it sorts by score: the proof compares the layers before that
        slimming.prune(model, plan)
        slimming.prune(model, planted)
        return {"exact": "proved to 1e-9", "change, ours": "proved to 1e-9"}
    pair = [outputs(f(model, plan), example) for f in (lambda m, p: slimming.prune(m, p, verify=False), slimming.mask)]
    thin = slimming.prune(model, planted, verify=False)
    change = relative_difference(outputs(thin, example), outputs(model, example))
    return {"exact": f"{relative_difference(*pair):.0e}", "change, ours": f"{change:.0e}"}


def give_up(*_) -> None:
    raise TimeoutError


def main() -> None:
    signal.signal(signal.SIGALRM, give_up)
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="regular expression of network names")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    names = [n for n in zoo.list_models(module=zoo) if not WITHOUT_BATCHNORM.match(n)]
    names += ["preresnet164", "densenet40", *DETECTION]
    print(f"torch {torch.__version__}, one thread, {options.repeats} turns\n")
    print("| network | ours (s) | theirs (s) | theirs / ours | prune - mask | change, ours | change, theirs | trains |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (n for n in names if re.match(options.only, n)):
        model, example = build(name)
        r = race(model, example, options.repeats) | check_ours(model, example)
        cells = [name, r["ours"], r["theirs"], r["ratio"], r["exact"], r["change, ours"], r["change, theirs"]]
        print("| " + " | ".join([*cells, f"{r['trains, ours']} / {r['trains, theirs']}"]) + " |", flush=True)
        del model, example
        gc.collect()


if __name__ == "__main__":
    main()
