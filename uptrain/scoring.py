"""Held-out nats per token while a model is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .data import validation_blocks
from .jobs import UptrainJob
from .objective import IGNORED_LABEL, prediction_loss_sum
from .recipe import LossWeights
from .work import data_folder

__all__ = ["under_autocast", "validation_score"]


def validation_score(job: UptrainJob) -> Callable[[Any], float] | None:
    """Nats per token on the validation slice, where there is one."""
    blocks = validation_blocks(data_folder(job))
    if blocks is None:
        return None
    weights = LossWeights(kl=0.0, cross_entropy=1.0)

    @torch.no_grad()
    def score(model: Any) -> float:
        device = next(model.parameters()).device
        total = 0.0
        for index in range(len(blocks["labels"])):
            feed = {name: tensor[index : index + 1].to(device) for name, tensor in blocks.items()}
            labels = feed.pop("labels")
            total += prediction_loss_sum(model(**feed, use_cache=False).logits, labels, weights).item()
        return total / int((blocks["labels"][:, 1:] != IGNORED_LABEL).sum())

    return score


def under_autocast(score: Callable[[Any], float] | None, precision: str) -> Callable[[Any], float] | None:
    """Score as a model is trained: frozen weights may be in bfloat16."""
    if score is None or precision != "bf16":
        return score

    def scored(model: Any) -> float:
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
            return score(model)

    return scored
