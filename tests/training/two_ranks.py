"""Run by torchrun on two processes, into the folder given: penalised gammas, ours and in-loss, and what is evaluated."""

import json
import os
import sys

import lightning.pytorch as pl
import torch
from reference import PENALTIES, InLoss, SlimmingModule, evaluate, fit

folder, accumulate = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)


class Bar(pl.Callback):
    """Asks on rank 0 alone for the accuracy so far, as the progress bar does."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_global_zero:
            assert 0 <= module.running_accuracy() <= 1


for penalty in PENALTIES:
    for kind in (SlimmingModule, InLoss):
        setting = {"devices": 2, "strategy": "ddp", "precision": "64-true", "accumulate_grad_batches": accumulate}
        module = fit(kind, unused=False, steps=5, callbacks=[Bar()], penalty=penalty, **setting)
        torch.save(module.model.state_dict(), f"{folder}/{penalty}_{kind.__name__}_{module.global_rank}.pt")
module = fit(SlimmingModule, unused=False, steps=5, steer=0.5, **setting)
torch.save({"sparsity": torch.tensor(module.penalty.sparsity)}, f"{folder}/steered_{module.global_rank}.pt")
for count in (359, 3):  # unequal shares
    found = evaluate(count, devices=2, strategy="ddp")
    if module.global_rank == 0:
        with open(f"{folder}/evaluated_{count}.json", "w") as file:
            json.dump(found, file)
sys.stdout.flush()
os._exit(0)  # as a rank of ours: gloo's threads can abort a process that ends in the ordinary way
