"""Latencies that are asked for and delivered: budget.latency on untrained networks; writes a section of results/latency.md.

    python benchmarks/latency.py FOLDER [--only REGEX] [--runtimes onnx,torch] [--shares 0.7,0.5] [--threads 1] [--out PAGE.md]

Every network has a folder in FOLDER: dense.ckpt with the tables of its layers beside it, and a folder for each pruning. What is
there is not done again, so the command goes on where it was stopped; remove a folder to do it anew. A step that fails leaves
what it said in `<step>.failed`, and the page says so; remove that file to try again. Gammas are drawn uniformly in [0, 1]
(seed 1). What is delivered is measured once more for this page, by processes of their own: the dense and the pruned network are
written anew, five fresh processes time both in turns, 50 turns each, and the median over the processes counts; where their
interquartile range exceeds 5% it is measured again, up to three times, and then called too noisy.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import slimming
from deployment import ROOT, drawn, save, step
from slimming import models
from slimming.deploy import onnx_format
from slimming.deploy.capturing import Network
from slimming.deploy.sharing import Setting, measured_share
from slimming.errors import LatencyError
from slimming.files import write_text
from slimming.records import Record
from slimming.report.document import Table
from slimming.report.latencies import describe

NETWORKS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # name -> (factory, arguments, pixels, images of a pass)
    "vgg19_quarter": ("vgg", {"depth": 19, "width": 0.25}, 32, 64),
    "vgg19": ("vgg", {"depth": 19}, 32, 64),
    "densenet40": ("densenet", {"depth": 40}, 32, 16),
    "resnet50": ("torchvision", {"name": "resnet50"}, 224, 1),
    "mobilenet_v2": ("torchvision", {"name": "mobilenet_v2"}, 224, 1),
}
ENGINES = {"onnx": "onnxruntime", "torch": "torch", "openvino": "openvino"}  # runtime -> engine
ALLOWED = 0.08  # of what is asked for
LIMIT_S = 3600.0  # that one pruning may take


def make(name: str, folder: Path) -> Path:
    """Write dense.ckpt of an untrained network."""
    factory, arguments, pixels, _ = NETWORKS[name]
    path = folder / "dense.ckpt"
    if not path.exists():
        torch.manual_seed(1)
        classes = 1000 if pixels == 224 else 10
        spec = {"name": factory, "arguments": arguments | {"num_classes": classes, "in_channels": 3}}
        data = {"num_classes": classes, "in_channels": 3, "image_size": pixels, "mean": [0.5] * 3, "std": [0.25] * 3}
        save(path, drawn(models.build(factory, **spec["arguments"])), Record(spec, config={}, data=data))
    return path


def prune(dense: Path, name: str, runtime: str, share: float, threads: int) -> Path | None:
    """Prune to a share of the latency as a user would; return the pruned checkpoint, None where it failed."""
    job = f"{runtime}-{threads}-{share:g}"
    command = [sys.executable, "prune.py", f"checkpoint={dense}", f"hydra.run.dir={dense.parent / job}"]
    command += [
        f"budget.latency={share}",
        f"runtime={runtime}",
        f"latency_threads={threads}",
        "trainer.accelerator=cpu",
    ]
    command += [f"latency_batch={NETWORKS[name][3]}", "test=false", "calibrate.batches=0"]
    return step(dense.parent, job, f"{job}/pruned.ckpt", command, LIMIT_S)


def measure_again(dense: Path, thin: Path, name: str, runtime: str, threads: int) -> None:
    """Measure what was delivered, apart from the pruning; leave it in again.json."""
    target = thin.parent / "again.json"
    if target.exists():
        return
    _, _, pixels, batch = NETWORKS[name]
    setting = Setting(ENGINES[runtime], (batch, 3, pixels, pixels), threads)
    with tempfile.TemporaryDirectory() as folder:
        files = [written(path, Path(folder) / path.stem, setting) for path in (dense, thin)]
        try:
            found = measured_share(*files, setting)
            told = {"delivered": found.median, "spread": found.spread, "ms": found.milliseconds}
        except LatencyError as error:
            told = {"error": str(error)}
    write_text(target, json.dumps(told))


def written(checkpoint: Path, path: Path, setting: Setting) -> Path:
    """Return a file of the network of a checkpoint that the engine reads."""
    if setting.engine == "torch":
        return checkpoint
    path = path.with_suffix(".onnx")
    onnx_format.write(Network(slimming.load(checkpoint), setting.images[1:], Record(None)), path)
    return path


# --- the page ---------------------------------------------------------------------------------------------------------


def row(name: str, thin: Path) -> list[str]:
    told = json.loads((thin.parent / "result.json").read_text())
    again, asked = json.loads((thin.parent / "again.json").read_text()), told["latency"]
    head = [name, asked["engine"], str(asked["batch"]), str(asked["threads"]), f"{asked['asked']:g}"]
    macs = told["cost"]["macs"] / told["cost_before"]["macs"]
    tail = [f"{asked['delivered']:.3f}", str(len(asked["tries"])), f"{macs:.0%}", f"{asked['table_s']:.0f}"]
    if "error" in again:
        return [*head, "too noisy", "-", "-", "-", *tail]
    off = again["delivered"] / asked["asked"] - 1
    times = " -> ".join(f"{ms:.3g}" for ms in again["ms"])
    met = f"{off:+.1%}" + ("" if abs(off) <= ALLOWED else " MISSED")
    return [*head, f"{again['delivered']:.3f}", met, f"{again['spread']:.1%}", times, *tail]


def page(root: Path, command: str) -> str:
    """Return the section of all networks below a folder."""
    heads = ["network", "engine", "batch", "threads", "asked", "delivered", "off by", "spread", "ms, dense -> pruned"]
    heads += ["by prune.py", "networks timed", "MACs left", "table (s)"]
    rows, machines, failed = [], {}, []
    for name in NETWORKS:
        for thin in sorted((root / name).glob("*/pruned.ckpt")):
            if (thin.parent / "again.json").exists():
                rows.append(row(name, thin))
                machines[describe(json.loads((thin.parent / "result.json").read_text())["latency"]["machine"])] = None
        failed += [f"* {name}, {path.stem}: {path.read_text()}" for path in sorted((root / name).glob("*.failed"))]
    lines = [
        "## Asked and delivered",
        "",
        f"`{command}`. {'; '.join(machines)}.",
        "",
        Table(heads, rows, left=2).markdown(),
    ]
    return "\n".join([*lines, *[""] * bool(failed), *failed]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="regular expression of network names")
    parser.add_argument("--runtimes", default="onnx,torch")
    parser.add_argument("--shares", default="0.7,0.5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the section goes; also printed")
    options = parser.parse_args()
    root = options.folder.resolve()
    for name in (name for name in NETWORKS if re.search(options.only, name)):
        print(name, flush=True)
        (root / name).mkdir(parents=True, exist_ok=True)
        dense = make(name, root / name)
        for runtime in options.runtimes.split(","):
            for share in map(float, options.shares.split(",")):
                thin = prune(dense, name, runtime, share, options.threads)
                if thin:
                    measure_again(dense, thin, name, runtime, options.threads)
    text = page(root, f"python {Path(__file__).relative_to(ROOT)} FOLDER")
    print(text)
    if options.out:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
