"""A process that kills runs and starts them again: `killing.py COMMAND FIRST COUNT FOLDER` writes FOLDER/report.json.

Every run is a fork of this process, which has imported everything, and does what the command line would. It is killed (-9)
at a seeded moment of the time that an undisturbed run takes, or in the middle of writing its n-th file; then the same command
runs to its end, and everything that it leaves is compared with the undisturbed run's, bit for bit.
"""

import csv
import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch
import torch
from torchvision import models as zoo

import slimming.reference
import slimming.report.figures
import slimming.stages

ROOT = Path(__file__).parents[2]
IMPORTED = (lightning.pytorch, zoo, slimming.reference, slimming.report.figures, slimming.stages)
SMALL = ["model=vgg11", "model.widths=[4,M,6]", "data=digits", "data.image_size=8", "data.crop=1"]
SMALL += ["trainer.limit_train_batches=4", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
TRAIN = [*SMALL, "trainer.max_epochs=40", "sparsity=0.01"]
SLIM = [*TRAIN, "ratio=0.5", "latency_batch=0", "calibrate.batches=2", "finetune.max_epochs=20"]
PRUNE = ["ratio=0.5", "latency_batch=0", "calibrate.batches=2", "trainer.accelerator=cpu"]
STRUCK: list[bool] = []  # whether the kill came before the end
RESUMED: list[bool] = []  # whether the second start went on inside a training
TIMING = {"time_s", "images_per_s", "wall_time_s", "resume", "parent", "checkpoint"}


def arguments(command: str, out: Path) -> list[str]:
    """Return the command line: the same one for the first start and the next."""
    if command == "sweep":
        return ["train.py", "-m", *TRAIN, "sparsity=0.01,0.02", "resume=true", f"hydra.sweep.dir={out}"]
    if command == "slim":
        return ["slim.py", *SLIM, f"hydra.run.dir={out}"]
    if command == "prune":
        return ["prune.py", *PRUNE, f"checkpoint={out.parent}/sparse/last.ckpt", f"hydra.run.dir={out}"]
    return ["train.py", *TRAIN, "resume=true", f"hydra.run.dir={out}"]


def start(argv: list[str], log: Path, writes: int | None = None) -> int:
    """Fork a run of a script; return its process id."""
    if pid := os.fork():
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        if writes is not None:
            _die_writing(writes)
        sys.argv = argv
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
    finally:
        os._exit(code if isinstance(code, int) else 1)


def _die_writing(number: int) -> None:
    """Kill this process in the middle of its n-th checkpoint."""
    save, left = torch.save, [number]

    def dying(content, file, *args, **kwargs):
        left[0] -= 1
        if left[0] <= 0:
            file.write(b"PK half of a checkpoint") if hasattr(file, "write") else Path(file).write_bytes(b"PK half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file, *args, **kwargs)

    torch.save = dying


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left(out: Path) -> dict:
    """Return what a run leaves, by path, without what tells of time and place."""
    found: dict = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".ckpt":
            content = torch.load(path, weights_only=True)
            found[name] = {k: content.get(k) for k in ("state_dict", "optimizer_states", "lr_schedulers", "epoch")}
        elif path.name == "metrics.csv":
            rows = csv.DictReader(path.read_text().splitlines())
            found[name] = [{k: v for k, v in row.items() if k not in TIMING} for row in rows]
        elif path.name in ("result.json", "plan.json"):
            found[name] = json.loads(path.read_text())
        elif ".hydra" not in path.parts and path.name != "multirun.yaml":
            found[name] = None  # pictures and pages: that they are there
    return found


def difference(a, b, where: str = "") -> str:
    """Say where two such records first differ, "" if they do not."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in (a | b) if k not in TIMING]
        missing = object()
        return next(filter(None, (difference(a.get(k, missing), b.get(k, missing), f"{where}/{k}") for k in keys)), "")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next(
            filter(None, (difference(x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))), ""
        )
    else:
        same = type(a) is type(b) and (a == b or a != a)
    return "" if same else f"{where}: {str(a)[:80]} / {str(b)[:80]}"


def undisturbed(command: str, folder: Path) -> tuple[dict, float]:
    """Run a command to its end; return what it leaves and the seconds it took."""
    if command == "prune":
        assert finish(start(arguments("train", folder / "sparse"), folder / "log")) == 0
    begun = time.monotonic()
    code = finish(start(arguments(command, folder / "straight"), folder / "log"))
    assert code == 0, (folder / "log").read_text()[-2000:]
    return left(folder / "straight"), time.monotonic() - begun


def strike(command: str, number: int, folder: Path, seconds: float, wanted: dict) -> str:
    """Kill one run and start it again; return what is wrong in the end, "" for nothing."""
    pick, out, log = random.Random(f"{command} {number}"), folder / f"killed{number}", folder / f"log{number}"
    argv = arguments("train" if command in ("writing", "terminated") else command, out)
    pid = start(argv, log, pick.randrange(2, 40) if command == "writing" else None)
    if command != "writing":
        time.sleep(pick.uniform(0.3, 0.98) * seconds)
        os.kill(pid, signal.SIGTERM if command == "terminated" else signal.SIGKILL)
    code = finish(pid)
    allowed = (128 + signal.SIGTERM, -signal.SIGTERM, 0) if command == "terminated" else (-signal.SIGKILL, 0)
    if code not in allowed:
        return f"exit code {code}"
    STRUCK.append(code != 0)
    if code != 0 or command != "prune":  # which refuses to overwrite what it has finished
        again = finish(start(argv, log))
        if again != 0:
            return f"again: exit code {again}: {log.read_text()[-300:]}"
    if halves := [str(p) for p in out.rglob(".*.tmp")]:
        return f"left over: {halves}"
    RESUMED.append("resuming after epoch" in log.read_text())
    return difference(left(out), wanted)


def main(command: str, first: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    wanted, seconds = undisturbed("train" if command in ("writing", "terminated") else command, folder)
    wrong = {n: strike(command, n, folder, seconds, wanted) for n in range(first, first + count)}
    report = {
        "kills": count,
        "before_the_end": sum(STRUCK),
        "resumed": sum(RESUMED),
        "seconds": seconds,
        "wrong": {k: v for k, v in wrong.items() if v},
    }
    Path("report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]).resolve())
