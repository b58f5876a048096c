"""FedExP (arXiv:2301.09604): a longer step where the sites' changes point apart, so that their mean is too short."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from ..asked import Needs
from ..cohort import Cohort
from . import Step, registry


@registry.register("fedexp", Needs(reads=("products",), canonical=True, products=True))
def fedexp(
    cohort: Cohort,
    weights: Sequence[float],
    *,
    epsilon: Annotated[
        float, Field(ge=0, le=1e6, description="ε: keeps the step short where the mean change is tiny.")
    ] = 1e-3,
    most: Annotated[float, Field(ge=1, le=100, description="Longest step.")] = 1.5,
) -> Step:
    """x + η·d with η = max(1, Σ wₖ‖Dₖ‖² / (2(‖Σ wₖDₖ‖² + ε))), at most `most`; ε relative to Σ wₖ‖Dₖ‖²."""
    share = torch.tensor(list(weights), dtype=torch.float64)
    apart = float(share @ cohort.products.diagonal())
    together = float(share @ cohort.products @ share)
    rate = apart / (2 * (together + epsilon * apart)) if apart > 0 else 1.0
    return Step(gain=lambda _: min(max(rate, 1.0), most))
