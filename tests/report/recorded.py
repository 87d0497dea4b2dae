"""Records of runs as the stages write them, for the tests of reports."""

import json


def history(epochs):
    keys = ("train/loss", "train/acc", "test/loss", "test/acc", "lr")
    return [{"epoch": e + 1} | {k: 0.5 + 0.01 * e for k in keys} for e in range(epochs)]


def trained(role, seed=1, accuracy=0.8, epochs=3, sparsity=1e-4, parent=None, **more):
    edges = [0.0] + [10 ** (-6 + i / 8) for i in range(57)]
    counts = [[0] * 57 for _ in range(2)]
    counts[-1][0], counts[-1][40] = 5, 15
    return {
        "format": 1,
        "status": "finished",
        "stage": "train",
        "role": role,
        "model": "vgg11",
        "data": "digits",
        "seed": seed,
        "parent": parent,
        "metrics": {"test/acc": accuracy},
        "cost": {"num_params": 1000, "macs": 50_000},
        "activation_bytes": 4000,
        "size_bytes": 4100,
        "widths": [8, "M", 12],
        "history": history(epochs),
        "gammas": {"edges": edges, "counts": counts},
        "config": {"sparsity": sparsity, "seed": seed, "data": {"seed": seed, "root": f"/x/{seed}/images"}},
    } | more


def pruned(parent, asked=0.5, seed=1, got=None, cost=400, plan=None, **config):
    told = {"ties": "together", "score": "gamma", "ratio": asked, "calibrate": {"batches": 100}} | config
    return trained("pruned", seed, parent=parent, stage="prune", config=told, history=None) | {
        "metrics": {"test/acc_before": 0.8, "test/acc_pruned": 0.1 * (asked or 0), "test/acc": 0.8 - (asked or 0) / 10},
        "cost": {"num_params": cost, "macs": 20_000},
        "cost_before": {"num_params": 1000, "macs": 50_000},
        "widths_before": [8, "M", 12],
        "widths": [4, "M", 6],
        "ratio": {"asked": asked, "got": got or asked},
        "criterion": {"criterion": "GlobalRatio", "ratio": asked},
        "score": "gamma",
        "plan": plan or {"restored": 2, "dead": 1},
        "gammas": {"kept": [1], "removed": [1], "edges": [0, 1], "threshold": 0.01 * (asked or 0.3)},
        "latency_ms": {"before": 10.0, "after": 5.0, "batch": 64, "device": "cpu, 2 threads", "precision": "32-true"},
    }


def tuned(parent, role="finetuned", seed=1, accuracy=0.79, **more):
    config = {"finetune": {"init": "weights", "distill": {"teacher": None}}, "seed": seed}
    return trained(role, seed, accuracy, parent=parent, stage="finetune", config=config, **more) | {
        "cost": {"num_params": 400, "macs": 20_000}
    }


def write(folder, name, result):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "result.json").write_text(result if isinstance(result, str) else json.dumps(result))
