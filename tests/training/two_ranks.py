"""Run by torchrun on two processes: the penalised gammas of each rank, ours and in-loss, into the folder given."""

import sys

import torch
from reference import InLoss, SlimmingModule, fit

folder, accumulate = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
for kind in (SlimmingModule, InLoss):
    module = fit(
        kind, devices=2, strategy="ddp", precision="64-true", unused=False, accumulate_grad_batches=accumulate, steps=5
    )
    torch.save(module.model.state_dict(), f"{folder}/{kind.__name__}_{module.global_rank}.pt")
