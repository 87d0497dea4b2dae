"""Prune the smallest network of every timm family that has BatchNorm scales, beside torch-pruning; writes a table.

    pip install torch-pruning
    python benchmarks/zoo.py [--only REGEX] [--turns 3] [--out results/zoo.md] [--rows FILE]

A family is a source file of timm and the first word of the names in it (`python benchmarks/zoo.py --families` lists them
anew); taken is the member with the fewest parameters, below 30 million. Every BatchNorm is drawn at random; a global ratio of
0.5 is pruned both ways of ties. Exactness: float64, batch of 2 in eval mode and of 4 in train mode with the running
statistics, prune against mask, by the comparison of the tests; and the proof inside `prune`. Seconds: trace + plan + prune
without the proof, float32, one core, median of the turns, against torch-pruning's BNScalePruner on a copy, in turns.
"""

import argparse
import copy
import gc
import json
import platform
import re
import signal
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import slimming
from slimming.channels.graph import ChannelGraph
from slimming.channels.graph.liveness import solve

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "channels"))
from exactness import assert_exact, randomise

LIMIT_S = 30  # for one pruning by the other tool
NAMES = """
bat_resnext26ts botnet26t_256 coatnet_pico_rw_224 convmixer_768_32 cpubone_nano cs3darknet_focus_s cspdarknet53
cspnext_tiny cspresnet50 cspresnext50 darknet17 densenet121 densenetblur121d dla46x_c dpn48b eca_botnext26ts_256
eca_resnext26ts eca_vovnet39b ecaresnet26t ecaresnext26t_32x4d efficientformer_l1 efficientformerv2_s0
efficientnet_lite0 efficientnetv2_rw_t efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw
fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b gc_efficientnetv2_rw_t gcresnet33ts gcresnext26ts gernet_s ghostnet_050
ghostnetv3_050 halo2botnet50ts_256 halonet_h1 haloregnetz_b hardcorenas_b hgnet_tiny hgnetv2_b0 hrnet_w18_small
iformer_t inception_next_atto inception_v3 lambda_resnet26t lamhalobotnet50ts_256 lcnet_035 lcnetv2_small
legacy_seresnet18 legacy_xception levit_128s lowformer_b0 maxvit_pico_rw_256 mixnet_s mnasnet_small
mobilenet_edgetpu_100 mobilenetv2_035 mobilenetv3_small_050 mobileone_s1 mobilevit_xxs mobilevitv2_050 regnetv_040
regnetx_002 regnety_002 regnetz_005 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m1 res2next50 resnest14d resnet10t
resnet32ts resnetaa34d resnetblur18 resnetv2_18 resnext26ts resnext50_32x4d rexnet_100 rexnetr_100 sebotnet33ts_256
sedarknet21 sehalonet33ts semnasnet_050 seresnet18 seresnet33ts seresnetaa50d seresnext26t_32x4d seresnext26ts
shvit_s1 skresnet18 skresnext50_32x4d spnasnet_100 starnet_s050 swiftformer_xs test_byobnet test_coatnet
test_efficientnet test_maxvit test_resnet tf_efficientnet_lite0 tf_efficientnetv2_b0 tf_mixnet_s
tf_mobilenetv3_small_075 tiny_vit_5m_224 tinynet_e visformer_tiny volo_d1_224 vovnet39a xception41p
xcit_nano_12_p8_224
"""
FAMILIES = NAMES.split()


def families() -> list[str]:
    """Return the smallest network of every family, as found in the timm that is installed."""
    import timm
    from timm.models import model_entrypoint

    found: dict[tuple[str, str], tuple[int, str]] = {}
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        size = sum(p.numel() for p in model.parameters())
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
        if norms and size < 30e6:
            family = model_entrypoint(name).__module__, re.match(r"(tf_|test_)?([a-z]+)", name).group(0)
            found[family] = min(found.get(family, (size, name)), (size, name))
    return sorted(name for _, name in found.values())


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network with random BatchNorms in float64 and an example: 64 pixels, or the smallest size that it takes."""
    import timm

    torch.manual_seed(0)
    model = randomise(timm.create_model(name, pretrained=False, drop_rate=0.0)).eval()
    for size in (64, 128, model.pretrained_cfg["input_size"][-1]):
        example = torch.randn(1, 3, size, size, dtype=torch.float64)
        try:
            with torch.inference_mode():
                model(example)
            return model, example
        except Exception:  # an input size that it refuses
            continue
    raise RuntimeError(f"{name} runs on no size")


def shrinking_share(graph: ChannelGraph, plan: slimming.PruningPlan) -> float:
    """Return the share of the removed gammas with which a channel of a tensor went, before or behind the BatchNorm."""
    kept = torch.ones(graph.count, dtype=torch.bool)
    for name, indices in plan.keep.items():
        own = torch.zeros(graph.norms[name].module.num_features, dtype=torch.bool)
        own[indices] = True
        kept[graph.norms[name].all] = own
    live = solve(graph, kept, torch.zeros(graph.tape.count, dtype=torch.bool)).live
    sides = [torch.cat([graph.component[getattr(n.use, s)] for n in graph.norms.values()]) for s in ("read", "write")]
    gone = ~(live[sides[0]] & live[sides[1]])
    return float(gone[~kept].double().mean()) if bool((~kept).any()) else 0.0


def exact(model: nn.Module, example: torch.Tensor) -> dict:
    """Prune both ways and compare; the cells of the table."""
    graph = slimming.trace(model, example)
    shares, cells = graph.shares(), {}
    for ties in ("together", "apart"):
        try:
            plan = graph.plan(slimming.GlobalRatio(0.5), ties=ties)
            assert_exact(model, plan, example)
            slimming.prune(model, plan)
            cells[ties] = f"{plan.got['macs']:.0%} / {plan.got['params']:.0%}"
            cells[f"{ties} shrinks"] = f"{shrinking_share(graph, plan):.0%}"
        except slimming.SlimmingError as error:
            cells[ties], cells[f"{ties} shrinks"] = f"REFUSED: {error}"[:80], "-"
        except AssertionError:
            cells[ties], cells[f"{ties} shrinks"] = "WRONG", "-"
    cells["free"] = f"{shares['together']:.0%} / {shares['apart']:.0%}"
    cells["gammas"], cells["shares"] = f"{shares['gammas']:,}", shares
    cells["blocked"] = "; ".join(f"{share:.0%} {reason}" for reason, share in shares["blocked"].items()) or "-"
    return cells


def ours(model: nn.Module, example: torch.Tensor) -> float:
    start = time.perf_counter()
    graph = slimming.trace(model, example)
    slimming.prune(model, graph.plan(slimming.GlobalRatio(0.5)), verify=False)
    return time.perf_counter() - start


def theirs(model: nn.Module, example: torch.Tensor) -> tuple[float, str]:
    """Return the seconds that the other tool takes and what becomes of the network; raises whatever it crashes with."""
    import torch_pruning as tp

    start = time.perf_counter()
    thin = copy.deepcopy(model)  # it prunes in place; both are to leave the network as it is
    heads = [m for m in thin.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    before = sum(p.numel() for p in thin.parameters())
    importance = tp.importance.BNScaleImportance()
    options = {"pruning_ratio": 0.5, "global_pruning": True, "ignored_layers": heads}
    tp.pruner.BNScalePruner(thin, example, importance=importance, **options).step()
    seconds = time.perf_counter() - start
    left = sum(p.numel() for p in thin.parameters()) / before
    with torch.no_grad():
        thin.eval()(example)
    return seconds, f"{left:.0%} of the parameters"


def race(model: nn.Module, example: torch.Tensor, turns: int) -> dict:
    """Take turns; the other tool stops taking part when it fails or has taken 10 s."""
    mine, other, outcome = [], [], "-"
    ours(model, example)  # warm-up
    for _ in range(turns):
        gc.collect()
        mine.append(ours(model, example))
        if sum(other) > 10 or outcome.startswith(("fails", "not")):
            continue
        signal.alarm(LIMIT_S)
        try:
            seconds, outcome = theirs(model, example)
            other.append(seconds)
        except TimeoutError:
            outcome = f"not done in {LIMIT_S} s"
        except Exception as error:
            outcome = f"fails: {type(error).__name__}"
        finally:
            signal.alarm(0)
    ratio = f"{statistics.median(b / a for a, b in zip(mine, other, strict=False)):.1f}" if other else "-"
    seconds = f"{statistics.median(mine):.2f} / " + (f"{statistics.median(other):.2f}" if other else "-")
    return {"seconds": seconds, "ratio": ratio, "outcome": outcome}


COLUMNS = {
    "network": "network",
    "gammas": "gammas",
    "free": "may be chosen, together / apart",
    "together": "together: MACs / parameters left",
    "together shrinks": "... removed gammas that shrink a tensor",
    "apart": "apart: MACs / parameters left",
    "apart shrinks": "... removed gammas that shrink a tensor",
    "seconds": "seconds, ours / theirs",
    "ratio": "theirs / ours",
    "outcome": "torch-pruning leaves",
    "blocked": "not to be chosen together, and why",
}


def page(rows: list[dict], versions: str) -> str:
    """Return the table and what it comes to."""
    wrong = [r["network"] for r in rows for ties in ("together", "apart") if r[ties].startswith(("WRONG", "REFUSED"))]
    whole = sum(r["shares"]["together"] == 1 for r in rows)
    most = sum(r["shares"]["together"] >= 0.5 for r in rows)
    raced = [float(r["ratio"]) for r in rows if r["ratio"] != "-"]
    slower = [f"{r['network']} ({r['ratio']})" for r in rows if r["ratio"] != "-" and float(r["ratio"]) < 1]
    failed = sum(r["outcome"].startswith("fails") for r in rows)
    late = sum(r["outcome"].startswith("not") for r in rows)
    lines = [
        "# The smallest network of every timm family",
        "",
        f"`python benchmarks/zoo.py --out results/zoo.md`; {versions}. What the columns mean is said at the top of that file.",
        "",
        f"* {len(rows)} networks; pruned by half both ways, equal to their masks to 1e-9 and proven by `prune`: "
        f"{len(rows) - len(set(wrong))}. Wrong or refused: {', '.join(sorted(set(wrong))) or 'none'}.",
        f"* Every gamma may be chosen apart in {sum(r['shares']['apart'] == 1 for r in rows)} of them; together every gamma "
        f"in {whole}, half of them or more in {most}; the last column says what stands in the way elsewhere.",
        f"* torch-pruning finishes with {len(raced)}, fails with {failed} and is not done in {LIMIT_S} s with {late}. Of those "
        f"that it finishes ours is faster on {sum(r >= 1 for r in raced)}: {min(raced):.1f} to {max(raced):.1f} times, median "
        f"{statistics.median(raced):.1f}. Slower: {', '.join(slower) or 'none'}.",
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row[key] for key in COLUMNS) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def give_up(*_) -> None:
    raise TimeoutError


def _is_file(path: Path | None) -> bool:
    return path is not None and path.is_file()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression of network names")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the table goes; also printed")
    parser.add_argument(
        "--rows", type=Path, help="a JSON lines file: what is in it is not done again, what is done is added"
    )
    parser.add_argument("--families", action="store_true", help="list the networks that timm has now, and stop")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.families:
        print(*families())
        return
    import timm

    signal.signal(signal.SIGALRM, give_up)
    torch.set_num_threads(1)
    done = [json.loads(line) for line in options.rows.read_text().splitlines()] if _is_file(options.rows) else []
    rows = {row["network"]: row for row in done}
    for name in (n for n in FAMILIES if re.search(options.only, n) and n not in rows):
        model, example = build(name)
        rows[name] = {"network": name} | exact(model, example) | race(model.float(), example.float(), options.turns)
        print("| " + " | ".join(rows[name][key] for key in COLUMNS) + " |", flush=True)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
        del model
        gc.collect()
    versions = f"timm {timm.__version__}, torch {torch.__version__}, torch-pruning {version('torch-pruning')}, "
    versions += f"Python {platform.python_version()}, one core, {options.turns} turns"
    text = page([rows[name] for name in FAMILIES if name in rows], versions)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
