"""What the record of a run says of others: which keys of its configuration matter to the result."""

import json
from typing import Any

# Everything else matters. These say where things lie, how a run is shown, or how fast it goes; not what comes out of it.
FREE = {
    *("resume", "checkpoint", "init_from", "logger", "callbacks", "latency_batch"),
    *("data.root", "data.cache_dir", "data.download", "data.num_workers", "data.eval_batch_size"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler"),
}
WHETHER = {"distill.teacher", "finetune.distill.teacher"}  # paths of which it matters only whether there is one


def what_matters(config: dict) -> dict[str, Any]:
    """Flatten a configuration to dotted keys: those that can change the result and are not None."""
    return {key: value for key, value in _flat(config, "").items() if value is not None}


def config_differences(before: dict, now: dict) -> str:
    """Say where two configurations differ in what matters to the result: `sparsity was 0.1, is 0.2; ...`, or ""."""
    a, b = (what_matters(json.loads(json.dumps(config))) for config in (before, now))  # tuples are lists in a file
    return "; ".join(f"{k} was {a.get(k)}, is {b.get(k)}" for k in sorted(a | b) if a.get(k) != b.get(k))


def _flat(config: dict, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in FREE:
            flat |= _flat(value, f"{key}.")
        elif key not in FREE:
            flat[key] = value is not None if key in WHETHER else value
    return flat
