"""FedYogi (arXiv:2003.00295): as FedAdam, but v falls slowly after one large change."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from ..asked import Needs
from ..cohort import Cohort
from . import Step, registry
from .adam import adaptive


@registry.register("yogi", Needs(canonical=True))
def yogi(
    cohort: Cohort,
    weights: Sequence[float],
    *,
    learning_rate: Annotated[float, Field(gt=0, le=100, description="η: step length, times the mean change.")] = 1e-2,
    beta1: Annotated[float, Field(ge=0, lt=1, description="Share of past changes that is kept.")] = 0.9,
    beta2: Annotated[float, Field(ge=0, lt=1, description="Share of their squares that is kept.")] = 0.99,
    tau: Annotated[float, Field(gt=0, le=1e6, description="τ: a change below it counts as small.")] = 1e-3,
) -> Step:
    """m ← β₁m + (1−β₁)d;  v ← v − (1−β₂)·d²·sign(v − d²);  x + η·m/(√v + τ), with v = τ² before the first round."""
    return adaptive(lambda v, squared: v - (1 - beta2) * squared * torch.sign(v - squared), learning_rate, beta1, tau)
