"""Logits changed while a site trains, so that it does not unlearn the classes it hardly has: FedRS, FedLC and logit
adjustment."""

from dataclasses import dataclass

import torch
from datasets import Dataset

from ...config import RoundPlan
from ..model.base_model import BaseModel


@dataclass(frozen=True)
class ClassShift:
    """What a site does to its logits while it trains, so that classes it hardly has are not unlearned: z·keep − margin.

    Nothing about its classes leaves the site for it, and evaluation does without.
    """

    keep: torch.Tensor
    margin: torch.Tensor

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * self.keep.to(logits) - self.margin.to(logits)


def class_shift(base: BaseModel, rows: Dataset, plan: RoundPlan) -> ClassShift | None:
    """FedRS: logits of classes that do not occur are scaled by α. FedLC (arXiv:2209.00189): a margin τ·n^(−1/4) for
    each class, a class that does not occur counting as one that occurs once. Logit adjustment (arXiv:2007.07314): a
    margin −τ·log π, with π the frequency of a class at this site, one that does not occur counting as half a row.
    """
    settings = plan.training
    if settings.restricted_softmax == 1 and settings.logit_calibration == settings.logit_adjustment == 0:
        return None
    counts = base.task.class_counts(rows, plan)
    keep = torch.where(counts > 0, 1.0, settings.restricted_softmax)
    rare = counts.clamp(min=1) ** -0.25
    often = (counts + 0.5) / (counts + 0.5).sum()
    return ClassShift(keep, settings.logit_calibration * rare - settings.logit_adjustment * often.log())
