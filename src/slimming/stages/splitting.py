"""low_rank=<share>: layers of a checkpoint's network split into factors."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimming.channels.low_rank import Splitting, low_rank
from slimming.config import ExportConfig
from slimming.deploy.capturing import plain_copy
from slimming.deploy.proving import prove
from slimming.errors import ConfigError
from slimming.records import Record
from slimming.stages.building import dtype_of
from slimming.stages.recording import rank_zero
from slimming.stages.sources import Source


def split(model: nn.Module, share: float, record: Record, example: Tensor, path: str | None) -> Splitting:
    """Return a copy of a network with layers split, and say how many; `record`, `path`: of its checkpoint.

    Raises:
        ConfigError: layers of it are split already, or rank 1 leaves more than that share.
    """
    if record.low_rank:
        raise ConfigError(f"low_rank: the layers of {path} are split already; go without low_rank")
    found = low_rank(model, example.to(dtype_of(model)), share)
    if rank_zero():
        print(f"low rank: {len(found.splits)} layers split; {found.share:.1%} of the MACs of all that can be remain")
    return found


def split_source(cfg: ExportConfig, source: Source) -> tuple[Source, dict[str, Any] | None]:
    """Return what an export begins with, its layers split where that is asked, and what export.json says of it."""
    if cfg.low_rank is None:
        return source, None
    found = split(source.model, cfg.low_rank, source.record, source.example, cfg.checkpoint)
    record = replace(source.record, low_rank=found.splits or None)
    facts = {"asked": cfg.low_rank, "share": found.share, "layers": len(found.splits)}
    return replace(source, model=found.model.eval(), record=record, dense=source.dense or (lambda: source.model)), facts


def compare_split(whole: Source, split: Source, batches: Iterator[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
    """Return, and print, what splitting costs: it is exact at full rank alone."""
    model = plain_copy(split.model)

    def run(images: Any) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    proof = prove(run, whole.model, batches)
    told = f"low rank: the outputs differ by {proof.relative:.1e} of the largest"
    if proof.labelled:
        told += f"; test accuracy {proof.accuracy_before:.2%} whole -> {proof.accuracy:.2%} split"
    print(f"{told}; finetune.py low_rank=<share> trains the factors")
    return {"relative": proof.relative, "test/acc_whole": proof.accuracy_before, "test/acc_split": proof.accuracy}
