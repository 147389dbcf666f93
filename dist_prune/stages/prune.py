"""Cut the plan's channels out of the dense network, for real."""

import torch

from dist_prune.pruning import surgeon
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """dense.safetensors, round_1/plan.json -> round_1/small.safetensors"""
    model, plan = work.dense().eval(), work.plan
    surgeon.operate(model, work.channels, plan)
    with torch.no_grad():
        model(work.example)
    return Made({}, {"round_1/small.safetensors": (model.state_dict(), {"plan": plan.fingerprint})})
