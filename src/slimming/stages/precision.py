"""trainer.precision=auto: what the hardware computes natively, settled once per run and kept when the run is resumed."""

import contextlib
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from slimming import checkpoint
from slimming.errors import CheckpointError, ConfigError
from slimming.records import Record
from slimming.stages.recording import rank_zero

AUTO = "auto"
FULL = "32-true"
NAMES = {"cpu": "CPU", "cuda": "GPU"}  # of the device types whose abilities are known


def settled(trainer: dict[str, Any], *began: Path) -> dict[str, Any]:
    """Return a Trainer's values with another precision instead of `auto`, and say which.

    Args:
        began: paths where last.ckpt of the run that is going on may be: its precision stays.
    """
    if trainer.get("precision") != AUTO:
        return trainer
    before = next((path for path in began if path.exists()), None)
    if before:
        precision, why = of_record(checkpoint.read(before).record), "as the run began"
    else:
        precision, why = best(trainer)
    if rank_zero():
        print(f"trainer.precision=auto: {precision}, {why}")
    return trainer | {"precision": precision}


def of_record(record: Record) -> str | int:
    """Return the precision that a checkpoint's training ran in.

    Raises:
        CheckpointError: it is not a plain value; a file is data, and what it names is not run.
    """
    precision = ((record.config or {}).get("trainer") or {}).get("precision") or FULL
    if not isinstance(precision, str | int) or "$" in str(precision):  # OmegaConf would resolve it
        raise CheckpointError(
            f"the checkpoint's trainer.precision is {str(precision)[:200]}, which is not built on a file's word alone: "
            f"give trainer.precision={FULL} or another"
        )
    return precision


def best(trainer: dict[str, Any]) -> tuple[str, str]:
    """Return the precision that the device computes fastest in without loss, and why."""
    device = _device(trainer)
    if device is None:
        return FULL, "the accelerator's abilities are not known"
    if native_bf16(device):
        return "bf16-mixed", f"this {NAMES[device]} has native bf16"
    if device == "cuda":
        return "16-mixed", "this GPU has no native bf16; gradients are scaled"
    return FULL, "this CPU has no native bf16"


def native_bf16(device: str) -> bool:
    """Return whether a device type, cpu or cuda, computes in bfloat16 without emulation."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not _cpu_abilities().isdisjoint(("avx512_bf16", "amx_bf16"))


def tell(say, trainer: pl.Trainer) -> None:
    """Say that another precision would be much faster."""
    warn_of_emulation(say, trainer)
    device = trainer.strategy.root_device.type
    if trainer.precision == FULL and device in NAMES and native_bf16(device):
        say(f"  hint: this {NAMES[device]} has native bf16; trainer.precision=bf16-mixed, or auto, would be faster")


def warn_of_emulation(say, trainer: pl.Trainer) -> None:
    """Say that the device has to emulate the bfloat16 that it is asked for."""
    device = trainer.strategy.root_device.type
    if trainer.precision.startswith("bf16") and device in NAMES and not native_bf16(device):
        say(
            f"  WARNING: this {NAMES[device]} has no native bf16: trainer.precision={trainer.precision} is emulated and runs"
        )
        say("  several times slower than 32-true; trainer.precision=auto takes what the machine is good at")


def check_agreed(trainer: pl.Trainer) -> None:
    """Raise ConfigError on all ranks unless they compute in one precision; the ranks are connected."""
    if trainer.world_size == 1:
        return
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, trainer.precision)
    if len(set(found)) > 1:
        ranks = ", ".join(f"{p} on rank {found.index(p)}" for p in dict.fromkeys(found))
        raise ConfigError(
            f"trainer.precision is {ranks}: all ranks must compute alike; give one of them instead of auto"
        )


def check_kept(trainer: pl.Trainer, asked: Any) -> None:
    """Raise ConfigError where Lightning would go on with a run in bf16 that was recorded with fp16."""
    if str(asked).startswith("16") and trainer.precision.startswith("bf16"):
        raise ConfigError(
            f"trainer.precision={asked} needs a GPU, with which this run began: resume it on one, "
            "or start another run with init_from"
        )


def _device(trainer: dict[str, Any]) -> str | None:
    """Return the device type that Lightning will choose: cpu, cuda, or None for one that we know nothing of."""
    accelerator = trainer.get("accelerator") or "auto"
    if not isinstance(trainer.get("strategy") or "auto", str) or accelerator not in ("auto", "cpu", "gpu", "cuda"):
        return None  # a strategy object brings its own device
    if accelerator != "cpu" and torch.cuda.is_available():
        return "cuda"
    return None if accelerator != "cpu" and torch.backends.mps.is_available() else "cpu"


def _cpu_abilities() -> set[str]:
    if found := getattr(torch.cpu, "get_capabilities", dict)():  # torch knows since 2.9
        return {name for name, there in found.items() if there}
    with contextlib.suppress(OSError):
        return set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    return set()
