"""Training with the gamma penalty."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slimming import checkpoint, models
from slimming.config import TrainConfig, plain
from slimming.records import Record, Result
from slimming.stages import precision
from slimming.stages.building import build, build_data, example_of, model_spec, shape_of, try_model
from slimming.stages.fitting import Network, fit
from slimming.stages.recording import recorded, relative
from slimming.stages.resuming import LAST, resume_point
from slimming.stages.tasks import task_of


def train(cfg: TrainConfig, out: Path) -> float:
    """Train with the gamma penalty; leave last.ckpt, result.json, metrics.csv, curves.png and gammas.png in `out`.

    Returns:
        The test accuracy (of a detector mAP@0.5) of the last epoch, in [0, 1].

    Raises:
        SlimmingError: anything that the user can mend; result.json then says `failed`.
    """
    role = "sparse" if cfg.sparsity else "baseline"
    begun = Result("train", role, cfg.seed, relative(cfg.init_from, out), plain(cfg))
    with recorded(out, begun, cfg.logger, cfg.init_from) as run:
        cfg = replace(cfg, data=normalised(cfg), trainer=precision.settled(cfg.trainer, out / LAST))
        run.result.config = plain(cfg)
        start = resume_point(cfg.resume, run.result.config, out)
        torch.manual_seed(cfg.seed)
        data = build_data(cfg.data)
        facts = task_of(cfg).facts(cfg.model, shape_of(data))
        model = build("model", cfg.model, **facts)
        record = Record(model_spec(cfg.model, facts), stage="train", config=run.result.config)
        if cfg.init_from:
            try_model(model, example_of(data))
            checkpoint.load_weights(model, checkpoint.read(cfg.init_from))
        fit(cfg, run, Network(model, record), data, start)
    return run.result.metrics.get(f"test/{task_of(cfg).score}", math.nan)


def normalised(cfg: TrainConfig) -> dict[str, Any]:
    """Return the data group, its images normalised as those that pretrained weights were trained on.

    Values that are given (`data.mean`) stay, and so do data that fix their own.
    """
    name = cfg.model.get("_target_", "").removeprefix("slimming.models.")
    wanted = models.normalisation(name, cfg.model)
    return cfg.data | {key: value for key, value in wanted.items() if key in cfg.data and cfg.data[key] is None}
