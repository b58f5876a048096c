"""Less for a site whose change points away from what the other sites agree on. Needs nothing but the adapters."""

from typing import Annotated

import torch
from pydantic import Field

from ..asked import Needs
from ..cohort import Cohort
from . import registry


@registry.register("agreement", Needs(reads=("products",), products=True))
def agreement(
    cohort: Cohort,
    *,
    power: Annotated[float, Field(ge=0, le=100, description="Strictness; 0: every site counts the same.")] = 1.0,
) -> list[float]:
    """((1 + cosₖ) / 2)^power, with cosₖ the cosine of site k's change of ΔW to the sum of the others' unit changes:
    its own share in a consensus says nothing about agreement. 1 for a site that is alone or changed nothing.
    """
    gram = cohort.products
    norms = gram.diagonal().clamp(min=0).sqrt()
    safe = torch.where(norms > 0, norms, 1.0)
    cosines = gram / safe / safe[:, None]
    cosines.fill_diagonal_(0.0)
    others = cosines.sum().sub(cosines.sum(0) * 2)  # ‖Σ_{l≠k} uₗ‖² without its diagonal
    lengths = (others + (norms > 0).double().sum() - (norms > 0).double()).clamp(min=0).sqrt()
    towards = torch.where(lengths > 1e-12, cosines.sum(0) / lengths.clamp(min=1e-12), 1.0)
    towards = torch.where(norms > 0, towards, 1.0)
    return [float(((1 + t) / 2) ** power) for t in towards.clamp(-1, 1)]
