"""A process that reads damaged files until it is done: `fuzzing.py KIND FIRST COUNT FOLDER` writes FOLDER/report.json.

For every file the loader gives an object or raises an error of ours; anything else is noted as a fault. An audit hook notes
whatever is opened for writing, started or fetched outside of FOLDER; the address space is limited; an alarm ends a hang.
"""

import json
import os
import random
import resource
import signal
import struct
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from mutations import damaged_bytes, damaged_values
from PIL import Image

import slimming
from slimming import checkpoint, models, reference
from slimming.channels.plan import PruningPlan
from slimming.data import ImageFolder
from slimming.errors import SlimmingError
from slimming.records import RECORD_FORMAT
from slimming.report.collect import collect

MEMORY = 1 << 30  # bytes that reading may add to what an idle process of ours has mapped
SECONDS = 20  # for one file
KINDS: dict[str, Callable] = {}
ALWAYS_WATCHED = ("os.system", "subprocess.Popen", "socket.connect", "os.exec", "os.posix_spawn", "shutil.rmtree")


def kind(function: Callable) -> Callable:
    """List a generator: given a folder it prepares good files, and returns (pick, number) -> what to call."""
    KINDS[function.__name__] = function
    return function


def small_checkpoint(folder: Path) -> dict:
    """Return the content of a thin network's checkpoint, as `prune.py` leaves one."""
    torch.manual_seed(0)
    spec = models.spec("preresnet", {"depth": 20, "num_classes": 10, "in_channels": 3})
    model = models.build(spec["name"], **spec["arguments"])
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.weight)
    plan = slimming.trace(model.eval(), torch.zeros(1, 3, 16, 16)).plan(slimming.GlobalRatio(0.5), ties="apart")
    thin = slimming.prune(model, plan)
    data = {"num_classes": 10, "in_channels": 3, "image_size": 16, "mean": [0.5] * 3, "std": [0.2] * 3}
    config = {"data": {"_target_": "slimming.data.Digits"}, "trainer": {"_target_": "lightning.pytorch.Trainer"}}
    record = {"format": RECORD_FORMAT, "model": spec, "plans": [plan.to_dict()], "data": data, "stage": "prune"}
    return {
        "state_dict": {checkpoint.PREFIX + k: v for k, v in thin.state_dict().items()},
        "slimming": record | {"metrics": {}, "config": config},
        "epoch": 0,
    }


@kind
def checkpoints(folder: Path):
    content, path = small_checkpoint(folder), folder / "damaged.ckpt"
    torch.save(content, path)
    good = path.read_bytes()

    def make(pick, number):
        way = number % 4
        if way == 0:
            path.write_bytes(damaged_bytes(good, pick))
        elif way == 3:
            torch.save(content | {"state_dict": _odd_tensors(content["state_dict"], pick)}, path)
        else:
            torch.save(content | {"slimming": damaged_values(content["slimming"], pick)}, path)
        return lambda: slimming.load(path)

    return make


def _odd_tensors(state: dict, pick: random.Random) -> dict:
    """Give one entry another shape, kind, dtype, or a claim of 2^60 elements that share one."""
    key = pick.choice(sorted(state))
    huge = torch.zeros(1).as_strided((2**30, 2**30), (0, 0))
    odd = [torch.zeros(0), torch.zeros(3, 3), huge, torch.zeros(1).expand(2**60), state[key].to(torch.complex64)]
    odd += [state[key].bool(), torch.full_like(state[key].float(), float("nan")), None, "text", 1, [1], {}]
    return state | {key: pick.choice(odd)} if pick.random() < 0.8 else {k: v for k, v in state.items() if k != key}


@kind
def archives(folder: Path):
    """Archives that unpack to much more than they are, or whose members have names that lead elsewhere."""
    path = folder / "damaged.ckpt"
    torch.save(small_checkpoint(folder), path)
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}

    def make(pick, number):
        name = pick.choice(sorted(members))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if pick.random() < 0.5 else zipfile.ZIP_STORED) as archive:
            for member, data in members.items():
                new = (
                    pick.choice(("../../outside", "/tmp/outside", "a/" * 50, member.upper()))
                    if member == name
                    else member
                )
                bomb = bytes(pick.choice((10**6, 2 * 10**8))) if pick.random() < 0.3 else damaged_bytes(data, pick)
                keep_name = pick.random() < 0.5
                archive.writestr(member if keep_name else new, bomb if member == name else data)
        return lambda: slimming.load(path)

    return make


@kind
def plans(folder: Path):
    plan = small_checkpoint(folder)["slimming"]["plans"][0]
    text = json.dumps(plan).encode()

    def make(pick, number):
        if number % 3 == 0:
            raw = damaged_bytes(text, pick).decode(errors="replace")
        else:
            raw = json.dumps(damaged_values(json.loads(text), pick))
        return lambda: PruningPlan.from_json(raw)

    return make


@kind
def plans_applied(folder: Path):
    """Plans that can be read are applied, and prune refuses them or makes a network."""
    content = small_checkpoint(folder)
    spec = content["slimming"]["model"]
    model = models.build(spec["name"], **spec["arguments"]).eval()

    def make(pick, number):
        plan = damaged_values(content["slimming"]["plans"][0], pick)
        return lambda: slimming.prune(model, PruningPlan.from_dict(plan))

    return make


@kind
def results(folder: Path):
    text = json.dumps(_result()).encode()
    target = folder / "run" / "result.json"
    target.parent.mkdir()

    def make(pick, number):
        value = damaged_bytes(text, pick) if number % 3 == 0 else json.dumps(damaged_values(_result(), pick)).encode()
        target.write_bytes(value)

        def read():
            found = collect(folder)
            return [(r.asked, r.removed, r.dense, r.latency_share, r.identity, r.seeds, r.passes) for r in found.runs]

        return read

    return make


def _result() -> dict:
    cost = {"num_params": 10, "macs": 20}
    known = {"format": 1, "status": "finished", "error": None, "stage": "prune", "role": "pruned", "seed": 1}
    known |= {"model": "vgg11", "data": "digits", "metrics": {"test/acc": 0.5}, "cost": cost, "cost_before": cost}
    known |= {"ratio": {"asked": 0.5, "got": 0.5}, "parent": "../sparse/last.ckpt", "widths": [4, "M"], "n_test": 359}
    return known | {"config": {"seed": 1, "trainer": {"max_epochs": 2}, "data": {"root": "x"}}, "wall_time_s": 1.0}


@kind
def reports(folder: Path):
    """The whole report on a damaged result beside a good one."""
    from slimming.config import ReportConfig
    from slimming.stages.reporting import report

    for name in ("good", "bad"):
        (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs/good/result.json").write_text(json.dumps(_result()))

    def make(pick, number):
        (folder / "runs/bad/result.json").write_text(json.dumps(damaged_values(_result(), pick)))
        return lambda: report(ReportConfig(runs=str(folder / "runs")))

    return make


@kind
def reference_checkpoints(folder: Path):
    torch.manual_seed(0)
    dense = models.build("vgg", depth=11, width=0.125, num_classes=10, in_channels=3)
    state = {f"module.{k}": v for k, v in dense.state_dict().items()}
    content, path = {"state_dict": state, "cfg": [8, "M"], "best_prec1": 0.5}, folder / "damaged.pth.tar"
    torch.save(content, path)
    good = path.read_bytes()

    def make(pick, number):
        if number % 3 == 0:
            path.write_bytes(damaged_bytes(good, pick))
        else:
            torch.save(content | {"state_dict": _odd_tensors(state, pick)}, path)

        def read():
            weights = reference.read(path)
            if weights is not None:
                heads = reference.io_shape(weights)
                fresh = models.build("vgg", depth=11, width=0.125, num_classes=10, in_channels=3)
                reference.convert(weights, fresh, torch.zeros(1, heads["in_channels"], 32, 32), path)

        return read

    return make


@kind
def image_folders(folder: Path):
    """Damaged images, images of a billion pixels, links that lead out, odd names."""
    import shutil

    root = folder / "images"

    def fill():
        shutil.rmtree(root, ignore_errors=True)
        for part in ("train", "test"):
            for name in "ab":
                (root / part / name).mkdir(parents=True)
                Image.new("RGB", (8, 8), (1, 2, 3)).save(root / part / name / "0.png")

    def make(pick, number):
        fill()
        victim = root / pick.choice(("train", "test")) / pick.choice("ab")
        file = victim / "0.png"
        way = number % 5
        if way < 3:
            file.write_bytes(damaged_bytes(file.read_bytes(), pick))
        elif way == 3:
            file.write_bytes(png_bomb(pick.choice((2**14, 2**16, 2**20))))
        else:
            link = victim / pick.choice(("0.png", "..x.png", "1.png"))
            link.unlink(missing_ok=True)
            link.symlink_to(pick.choice(("/etc/passwd", "/dev/zero", "..", "0.png", "missing")))

        def read():
            data = ImageFolder(root=str(root), image_size=8, batch_size=2, cache_dir=str(folder / "cache"))
            data.prepare_data()
            data.setup()

        return read

    return make


def png_bomb(side: int) -> bytes:
    """Return a PNG of side x side black pixels, a few kB long (its data end early where it is large)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes(min((side + 1) * side, 10**7)))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@kind
def caches(folder: Path):
    """A damaged cache is made again, whatever it holds."""
    make_images = image_folders(folder)
    del make_images
    root, cache = folder / "images", folder / "cache"
    for part in ("train", "test"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (i, 2, 3)).save(root / part / name / f"{i}.png")

    def load():
        data = ImageFolder(root=str(root), image_size=8, batch_size=2, cache_dir=str(cache))
        data.prepare_data()
        data.setup()
        return {name: (split.images, split.labels) for name, split in data.splits.items()}

    good = load()
    originals = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}

    def make(pick, number):
        for path, data in originals.items():
            path.write_bytes(data)
        path = pick.choice(sorted(originals))
        if number % 3 and path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
            keys = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
            torch.save(content | _odd_tensors(keys, pick), path)
        else:
            path.write_bytes(damaged_bytes(originals[path], pick))
        return load if number % 3 else lambda: _same(load(), good)

    return make


def _same(given: dict, good: dict) -> None:
    """A cache of damaged bytes may not give other images: torch's archives have checksums."""
    for name, pair in good.items():
        for a, b in zip(given[name], pair, strict=True):
            assert torch.equal(a, b), f"other values in {name}"


@kind
def metrics(folder: Path):
    """metrics.csv is for people: a run goes on, and reports, whatever has become of it."""
    (folder / "run").mkdir()
    (folder / "run/result.json").write_text(json.dumps(_result()))
    good = b"epoch,train/loss\n1,0.5\n2,0.4\n"

    def make(pick, number):
        (folder / "run/metrics.csv").write_bytes(damaged_bytes(good, pick))
        return lambda: len(collect(folder).runs) == 1 or 1 / 0

    return make


# --- the process ------------------------------------------------------------------------------------------------------


class Watch:
    """Notes what is written, started or connected to outside a folder, while it is on."""

    def __init__(self, folder: Path):
        self.folder, self.on, self.seen = os.path.realpath(folder), False, []
        sys.addaudithook(self)

    def __call__(self, event, args):
        if not self.on:
            return
        if event in ALWAYS_WATCHED and event != "shutil.rmtree":
            self.seen.append(f"{event} {args[:1]}")
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._outside(args[0])
        if event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir"):
            self._outside(args[0])

    def _outside(self, path):
        real = os.path.realpath(os.fsdecode(path))
        if not (real + "/").startswith(self.folder + "/") and not real.startswith(("/dev/", "/proc/")):
            self.seen.append(f"wrote {real}")


def hang(signum, frame):
    raise TimeoutError(f"no answer after {SECONDS} s")


def examine(read: Callable, watch: Watch) -> tuple[str, str]:
    """Return (what came of it, the words): object, error of ours, or fault."""
    watch.on = True
    signal.alarm(SECONDS)
    try:
        read()
        came, words = "object", ""
    except SlimmingError as error:
        came, words = "error", str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        came, words = "fault", f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
    finally:
        signal.alarm(0)
        watch.on = False
    if watch.seen:
        came, words = "fault", f"outside: {watch.seen[:3]}"
        watch.seen.clear()
    return came, words


def mapped() -> int:
    """Return the bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(name: str, first: int, count: int, folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    make, watch = KINDS[name](folder), Watch(folder)
    make(random.Random("warm"), 1)  # imports what it needs
    resource.setrlimit(resource.RLIMIT_AS, (mapped() + MEMORY,) * 2)
    found = {"object": 0, "error": 0, "fault": 0, "faults": []}
    for number in range(first, first + count):
        came, words = examine(make(random.Random(f"{name} {number}"), number), watch)
        found[came] += 1
        if came == "fault" and len(found["faults"]) < 20:
            found["faults"].append([number, words])
    Path("report.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]).resolve())
