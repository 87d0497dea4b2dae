"""Every penalty equals autograd of the loss with it, and its step by hand, in every setting of the Trainer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import PENALTIES, SPARSITY, InLoss, evaluate, fit, make_trainer

from slimming.training.module import SlimmingModule

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_same(ours: SlimmingModule, reference: SlimmingModule, tolerance: float) -> None:
    a, b = ours.model.state_dict(), reference.model.state_dict()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
    start = torch.ones(3, dtype=ours.dtype)
    assert not torch.equal(ours.model.unused.weight, start), "a gamma without a gradient is penalised too"


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"accumulate_grad_batches": 3},  # 7 steps: windows of 3, 3 and 1
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_float64(penalty, setting):
    setting = {"precision": "64-true", "penalty": penalty} | setting
    assert_same(fit(SlimmingModule, **setting), fit(InLoss, **setting), 1e-12)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_bf16(accumulate):
    setting = {"precision": "bf16-mixed", "accumulate_grad_batches": accumulate}
    assert_same(fit(SlimmingModule, **setting), fit(InLoss, **setting), 1e-5)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_fp16_with_a_scaler(accumulate, penalty):
    def run(kind):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)  # grows on the way
        return fit(kind, scaler=scaler, accumulate_grad_batches=accumulate, penalty=penalty), scaler

    (ours, scaler), (reference, _) = run(SlimmingModule), run(InLoss)
    assert scaler.get_scale() > 1024
    assert_same(ours, reference, 1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_fp16_steps_that_the_scaler_skips_move_nothing(penalty, fused):
    momentum = (
        0.0 if fused else 0.9
    )  # torch's fused SGD leaves its momentum uninitialised where the first step is skipped

    def run(kind):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-15, growth_interval=1000)
        return fit(kind, scaler=scaler, penalty=penalty, momentum=momentum, fused=fused), scaler

    (ours, scaler), (reference, _) = run(SlimmingModule), run(InLoss)
    skipped = round((40 - torch.log2(torch.tensor(scaler.get_scale())).item()) / 15)
    assert 1 <= skipped <= 6
    assert_same(ours, reference, 1e-4)
    # The unused gamma feels the penalty alone, and under L1, which gives it a gradient, weight decay: its path counts the
    # steps really taken.
    value, velocity = 1.0, 0.0
    for _ in range(7 - skipped):
        velocity = momentum * velocity + SPARSITY + 1e-3 * value
        value -= 0.1 * (velocity if penalty == "l1" else SPARSITY)
    if penalty in ("l1", "proximal"):
        assert ours.model.unused.weight.tolist() == pytest.approx([value] * 3, rel=1e-5)


@pytest.mark.slow
def test_compiled():
    setting = {"precision": "64-true", "compile": True}
    ours = fit(SlimmingModule, **setting)
    assert_same(ours, fit(InLoss, precision="64-true"), 1e-9)
    assert all(not key.startswith("_orig_mod") and "_orig_mod" not in key for key in ours.state_dict())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks(accumulate, tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run(
        [*command, str(here / "two_ranks.py"), str(tmp_path), str(accumulate)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in PENALTIES:
        files = (tmp_path / f"{name}_{run}.pt" for run in ("SlimmingModule_0", "SlimmingModule_1", "InLoss_0"))
        ours, other, reference = (torch.load(file, weights_only=True) for file in files)
        for key in ours:
            torch.testing.assert_close(ours[key], reference[key], rtol=1e-12, atol=1e-12, msg=f"{name}: {key}")
        assert all(torch.equal(ours[k], other[k]) for k in ours if k.endswith(("weight", "bias"))), name
        assert not torch.equal(ours["bn1.running_mean"], other["bn1.running_mean"]), "the ranks saw the same images"
    steered = [torch.load(tmp_path / f"steered_{rank}.pt", weights_only=True)["sparsity"] for rank in (0, 1)]
    assert steered[0] == steered[1] > 0, "each rank steers by itself, to the same lambda"
    for count in (359, 3):  # every image counts once, also where the ranks have unequal numbers of them
        found = json.loads((tmp_path / f"evaluated_{count}.json").read_text())
        alone = evaluate(count)
        assert found["test/loss"] == pytest.approx(alone.pop("test/loss"), rel=1e-6)
        assert {key: found[key] for key in alone} == alone and found["count"] == count


def test_without_sparsity_gammas_are_not_pulled():
    torch.manual_seed(0)
    module = fit(SlimmingModule, precision="64-true")
    module.penalty.sparsity = 0.0
    assert module.model.unused.weight.max() < 1  # it was pulled above
    grad = module.model.unused.weight.grad
    module.model.unused.weight.grad = None
    module.penalty.add_gradient()
    assert grad is not None and module.model.unused.weight.grad is None


@pytest.mark.parametrize("penalty", PENALTIES)
def test_sparsity_0_leaves_every_bit_alone(penalty):
    plain = fit(SlimmingModule, sparsity=0.0)
    ours = fit(SlimmingModule, sparsity=0.0, penalty=penalty)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True))
    assert float(ours.model.bn1.weight.min()) < 0  # a clamp would have been seen


@pytest.mark.parametrize("penalty", ["proximal", "polarization"])
def test_resumed_equals_uninterrupted(penalty, tmp_path):
    straight = fit(SlimmingModule, penalty=penalty, max_epochs=2)
    fit(SlimmingModule, penalty=penalty, max_epochs=1).trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = fit(SlimmingModule, penalty=penalty, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert resumed.trainer.global_step == 14
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))


def test_a_second_fit_follows_each_optimizer_once(monkeypatch):
    """The same optimizer object again, also after a fit that broke off: one soft threshold a step."""
    from slimming.data import Digits

    torch.manual_seed(0)
    gamma = torch.nn.BatchNorm1d(64)
    model = torch.nn.Sequential(torch.nn.Flatten(), gamma, torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD([gamma.weight], 0.1)
    module = SlimmingModule(model, 10, lambda groups: optimizer, sparsity=SPARSITY, penalty="proximal")
    moved = []
    monkeypatch.setattr(module.penalty, "after_step", lambda gammas, lr: moved.append(lr))
    data = Digits(image_size=8, batch_size=32)
    for broken in (False, True, False):
        monkeypatch.setattr(module, "on_train_epoch_end", (lambda: 1 / 0) if broken else (lambda: None))
        trainer = make_trainer(limit_train_batches=3, limit_val_batches=0)
        try:
            trainer.fit(module, datamodule=data)
        except ZeroDivisionError:
            assert broken
    assert moved == [0.1] * 9
    optimizer.step()
    assert len(moved) == 9  # nobody follows after a fit
