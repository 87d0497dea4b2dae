"""Dense, pruned, int8 and low-rank networks in four engines: makes what is missing, measures, writes results/deployment.md.

    python benchmarks/deployment.py FOLDER [--only REGEX] [--trained NAME=DENSE.ckpt,PRUNED.ckpt] [--data OVERRIDE ...]
                                    [--engines torch,compile,onnxruntime,openvino] [--batch 1,64] [--threads 1,2]
                                    [--budget-s 1] [--out results/deployment.md]

Every network has a folder in FOLDER: checkpoints, one export per variant and format, one bench.json per engine. What is
there is not done again, so the command goes on where it was stopped; remove a folder to do it anew. A step that fails leaves
what it said in `<step>.failed`, and the page says so; remove that file to try again. Untrained networks have gammas drawn
uniformly in [0, 1] (seed 1): a global ratio of 0.5 prunes half of the channels (`vgg19`: the widths that the reference
implementation ends with at 70%); their int8 ranges are those of random images. Trained ones are exported with their data,
and have accuracies.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming import GlobalRatio, checkpoint, models, prune, trace
from slimming.errors import DataError
from slimming.files import write_text
from slimming.records import Record
from slimming.report.document import Table
from slimming.report.latencies import describe, read, times_as_fast

ROOT = Path(__file__).parents[1]
WIDTHS = [49, 64, "M", 128, 128, "M", 256, 256, 249, 208, "M", 116, 38, 18, 8, "M", 14, 9, 16, 94]
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {  # name -> (factory, arguments, pixels)
    "vgg19": ("vgg", {"depth": 19}, 32),
    "preresnet56": ("preresnet", {"depth": 56}, 32),
    "densenet40": ("densenet", {"depth": 40}, 32),
    "resnet50": ("torchvision", {"name": "resnet50"}, 224),
    "mobilenet_v2": ("torchvision", {"name": "mobilenet_v2"}, 224),
}
VARIANTS = {  # variant -> (checkpoint, options of export.py, in int8)
    "dense": ("dense", (), False),
    "dense + int8": ("dense", (), True),
    "pruned": ("pruned", (), False),
    "pruned + int8": ("pruned", (), True),
    "pruned + low rank": ("pruned", ("low_rank=0.5",), False),
}
ENGINES = {"torch": "torch", "compile": "torch", "onnxruntime": "onnx", "openvino": "openvino"}  # -> format
SUFFIX = {"torch": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
GOALS = {"vgg19": 1.8}  # times as fast as dense, in the same engine
INT8_GOAL, SHARE_GOAL = 1.5, 1.25


# --- making -----------------------------------------------------------------------------------------------------------


def make(name: str, folder: Path) -> None:
    """Write dense.ckpt and pruned.ckpt of an untrained network."""
    factory, arguments, pixels = NETWORKS[name]
    classes = 1000 if pixels == 224 else 10
    torch.manual_seed(1)
    spec = {"name": factory, "arguments": arguments | {"num_classes": classes, "in_channels": 3}}
    model = drawn(models.build(factory, **spec["arguments"]))
    data = {"num_classes": classes, "in_channels": 3, "image_size": pixels, "mean": [0.5] * 3, "std": [0.25] * 3}
    save(folder / "dense.ckpt", model, Record(spec, config={}, data=data))
    if name == "vgg19":
        thin = {"name": factory, "arguments": spec["arguments"] | {"widths": WIDTHS}}
        save(
            folder / "pruned.ckpt",
            drawn(models.build(factory, **thin["arguments"])),
            Record(thin, config={}, data=data),
        )
        return
    plan = trace(model, torch.zeros(1, 3, pixels, pixels)).plan(GlobalRatio(0.5))
    save(folder / "pruned.ckpt", prune(model, plan), Record(spec, [plan.to_dict()], config={}, data=data))


def drawn(model: nn.Module) -> nn.Module:
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
    return model.eval()


def save(path: Path, model: nn.Module, record: Record) -> None:
    if not path.exists():
        checkpoint.write_network(model, record, path)


def step(folder: Path, name: str, done: str, command: list[str], limit_s: float) -> Path | None:
    """Run a command unless what it leaves is there; return that, or None where it failed now or before."""
    target, failed = folder / done, folder / f"{name}.failed"
    if target.exists() or failed.exists():
        return target if target.exists() else None
    print(f"  {name}", flush=True)
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False)
        told = result.stderr.strip() if result.returncode else ""
    except subprocess.TimeoutExpired:
        told = f"not done in {limit_s:.0f} s"
    if target.exists():
        return target
    lines = [line for line in told.splitlines() if "HYDRA_FULL_ERROR" not in line and "Warn" not in line]
    write_text(failed, " ".join(" ".join(lines or ["nothing was left"]).split())[-300:])
    return None


def export(folder: Path, variant: str, format_name: str, trained: list[str] | None, limit_s: float) -> Path | None:
    """Export a variant; return the artefact."""
    source, options, int8 = VARIANTS[variant]
    name = f"{variant.replace(' + ', '-').replace(' ', '_')}-{format_name}"
    artefact = f"{name}/model{SUFFIX[format_name]}"
    if int8 and trained is None:
        before = folder / f"{source}-{format_name}" / f"model{SUFFIX[format_name]}"
        if not before.exists():
            return None
        command = [sys.executable, __file__, "--quantise", str(before), str(folder / artefact)]
        return step(folder, name, artefact, command, limit_s)
    options = [
        f"checkpoint={folder / source}.ckpt",
        f"format={format_name}",
        f"hydra.run.dir={folder / name}",
        *options,
    ]
    options += ["shape=auto"] * (source == "pruned" and format_name != "torch")  # `vgg19` comes without a plan
    options += ["quantize=int8"] * int8 + (["test_images=0"] if trained is None else trained)
    return step(folder, name, artefact, [sys.executable, "export.py", *options], limit_s)


def quantise_untrained(source: Path, target: Path) -> None:
    """Quantise an untrained network with the ranges of random images."""
    import numpy as np

    from slimming.deploy.engines import open_engine
    from slimming.deploy.quantising import quantise

    target.parent.mkdir(exist_ok=True)
    engine = open_engine(source, "onnxruntime" if source.suffix == ".onnx" else "openvino")
    assert engine.shape is not None
    random = np.random.default_rng(0)
    images = [random.standard_normal((8, *engine.shape[1:]), dtype=np.float32) for _ in range(2)]
    print(quantise(source, target, images, max_drop=None).describe(""))


def measure(folder: Path, options: argparse.Namespace, trained: list[str] | None) -> None:
    """Export all variants of a network and time them, each engine by itself."""
    for engine, format_name in ENGINES.items():
        if engine not in options.engines.split(","):
            continue
        files = []
        for variant, (source, extra, int8) in VARIANTS.items():
            if format_name != "torch":
                files.append(export(folder, variant, format_name, trained, options.limit_s))
            elif not int8:
                low_rank = bool(extra)
                files.append(
                    export(folder, variant, "torch", trained, options.limit_s)
                    if low_rank
                    else folder / f"{source}.ckpt"
                )
        listed = ",".join(str(path) for path in files if path)
        values = [
            f"models=[{listed}]",
            f"engines=[{engine}]",
            f"batch=[{options.batch}]",
            f"threads=[{options.threads}]",
        ]
        values += [f"budget_s={options.budget_s}", f"hydra.run.dir={folder / f'bench-{engine}'}"]
        if listed:
            done = f"bench-{engine}/bench.json"
            step(folder, f"bench-{engine}", done, [sys.executable, "bench.py", *values], options.limit_s)


# --- the page ---------------------------------------------------------------------------------------------------------


def variant_of(path: str) -> str:
    """Return the variant that a timed file is of."""
    where = Path(path)
    if where.suffix == ".ckpt":
        return where.stem
    name = where.parent.name.rpartition("-")[0]
    return next(v for v in VARIANTS if v.replace(" + ", "-").replace(" ", "_") == name)


def benches(folder: Path) -> dict[str, dict]:
    found = {}
    for engine in ENGINES:
        try:
            found[engine] = read(folder / f"bench-{engine}" / "bench.json")
        except DataError:
            continue
    return found


def facts(folder: Path, path: str) -> dict[str, Any]:
    """Return what export.json says of a timed file, {} of a checkpoint."""
    beside = folder / Path(path).parent.name / "export.json"
    return json.loads(beside.read_text()) if beside.is_file() else {}


def ratio(bench: dict, row: dict, base: str) -> float | None:
    """Return how many times as fast as the `base` variant a row is, at the same batch and threads."""
    for other in bench["rows"]:
        if variant_of(other["model"]) == base and all(other[k] == row[k] for k in ("batch", "threads")):
            return times_as_fast(row, other, bench["machine"], bench["machine"])
    return None


def network_table(folder: Path, found: dict[str, dict]) -> Table:
    settings = sorted({(r["batch"], r["threads"]) for bench in found.values() for r in bench["rows"]})
    heads = [f"ms, batch {batch}, {threads} thread{'s' * (threads > 1)}" for batch, threads in settings]
    rows = []
    for engine, bench in found.items():
        for path in dict.fromkeys(r["model"] for r in bench["rows"]):
            variant, known = variant_of(path), facts(folder, path)
            base = "dense + int8" if variant.endswith("int8") else "dense"
            cells = []
            for setting in settings:
                row = next(
                    (r for r in bench["rows"] if r["model"] == path and (r["batch"], r["threads"]) == setting), None
                )
                times = ratio(bench, row, base) if row else None
                cells.append(f"{row['median_ms']:.3g}" + f" ({times:.2f}x)" * (times is not None) if row else "-")
            accuracy = (known.get("accuracy") or {}).get("test/acc")
            size = bench["files"][path]["bytes"] / 1e6
            told = [engine, variant, "-" if accuracy is None else f"{accuracy:.2%}", f"{size:.2f}"]
            rows.append([*told, *cells])
    return Table(["engine", "network", "test accuracy", "MB", *heads], rows, left=2)


def macs(folder: Path) -> dict[str, int]:
    """Return the MACs of the dense and the pruned network, by name, as their exports counted them."""
    found = {}
    for name in ("dense", "pruned"):
        for format_name in ("onnx", "openvino"):  # not the folders of int8 and low rank
            path = folder / f"{name}-{format_name}" / "result.json"
            cost = json.loads(path.read_text()).get("cost") or {} if path.exists() else {}
            if "macs" in cost:
                found.setdefault(name, cost["macs"])
    return found


def goals(name: str, folder: Path, found: dict[str, dict]) -> list[str]:
    """Say which goals a network meets, in which engines and settings."""
    lines = []
    counted = macs(folder)
    for engine, bench in found.items():
        speeds: dict[str, list[float]] = {"pruned": [], "pruned + int8": []}
        for row in bench["rows"]:
            variant = variant_of(row["model"])
            if variant in speeds:
                base = "dense + int8" if variant.endswith("int8") else "dense"
                if (times := ratio(bench, row, base)) is not None:
                    speeds[variant].append(times)
        if least := min(speeds["pruned"], default=None):
            goal = GOALS.get(name, 1.0)
            lines.append(
                f"{_met(least >= goal)} {engine}: pruned at least {least:.2f} times as fast as dense (goal {goal})"
            )
            if {"dense", "pruned"} <= counted.keys() and name in ("vgg19", "resnet50"):
                share = counted["pruned"] / counted["dense"]
                told = f"pruned takes at most {1 / least:.0%} of the time for {share:.0%} of the MACs"
                lines.append(f"{_met(1 / least <= SHARE_GOAL * share)} {engine}: {told} (goal: {SHARE_GOAL} times)")
        if least := min(speeds["pruned + int8"], default=None):
            goal = INT8_GOAL if name == "vgg19" else 1.0
            told = f"pruned int8 at least {least:.2f} times as fast as dense int8 (goal {goal})"
            lines.append(f"{_met(least >= goal)} {engine}: {told}")
    return [f"* {line}" for line in lines]


def _met(good: bool) -> str:
    return "met:" if good else "MISSED:"


def page(root: Path, command: str) -> str:
    """Return the page of all networks below a folder."""
    lines = [
        "# Networks that leave the house",
        "",
        f"`{command}`. What is measured is said at the top of that file.",
        "",
    ]
    lines += [
        "Milliseconds are medians of passes taken in turns; in brackets: how many times as fast as the dense network in "
        "the same engine, of int8 networks as the dense one in int8.",
        "",
    ]
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        found = benches(folder)
        failed = {path.stem: path.read_text() for path in sorted(folder.glob("*.failed"))}
        if not found and not failed:
            continue
        lines += [f"## {folder.name}", ""]
        machines = dict.fromkeys(describe(bench["machine"]) for bench in found.values())
        lines += [*(f"{machine}." for machine in machines), ""] * bool(found)
        counted = macs(folder)
        if {"dense", "pruned"} <= counted.keys():
            lines += [f"MACs: {counted['dense'] / 1e6:.1f}M dense, {counted['pruned'] / 1e6:.1f}M pruned.", ""]
        lines += [network_table(folder, found).markdown(), "", *goals(folder.name, folder, found), ""] * bool(found)
        lines += [*(f"* not made: {name}: {why}" for name, why in failed.items()), ""] * bool(failed)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="regular expression of network names")
    parser.add_argument("--trained", action="append", default=[], help="NAME=DENSE.ckpt,PRUNED.ckpt")
    parser.add_argument(
        "--data", nargs="*", default=[], help="overrides for export.py of trained networks: data.root=..."
    )
    parser.add_argument("--batch", default="1,64")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--budget-s", type=float, default=1.0, help="seconds per file, batch and number of threads")
    parser.add_argument("--limit-s", type=float, default=600, help="seconds that one step may take")
    parser.add_argument("--out", type=Path, help="where the page goes; also printed")
    parser.add_argument("--quantise", nargs=2, type=Path, help=argparse.SUPPRESS)  # a step, in a process of its own
    options = parser.parse_args()
    if options.quantise:
        return quantise_untrained(*options.quantise)
    if options.folder is None:
        parser.error("give the folder that holds, or will hold, the networks")
    root = options.folder.resolve()
    trained = {name: paths.split(",") for name, _, paths in (given.partition("=") for given in options.trained)}
    for name in (name for name in [*NETWORKS, *trained] if re.search(options.only, name)):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        print(name, flush=True)
        if name not in trained:
            make(name, folder)
        for target, source in zip(("dense", "pruned"), trained.get(name, ()), strict=False):
            if not (folder / f"{target}.ckpt").exists():
                (folder / f"{target}.ckpt").write_bytes(Path(source).read_bytes())
        measure(folder, options, options.data if name in trained else None)
    shown = " ".join(
        ["python benchmarks/deployment.py FOLDER", *(f"--only {options.only}" for _ in [0] * bool(options.only))]
    )
    text = page(root, shown)
    print(text)
    if options.out:
        write_text(options.out, text)
    return None


if __name__ == "__main__":
    main()
