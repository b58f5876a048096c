"""FedAdam (arXiv:2003.00295): layers that change much move less."""

from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..asked import Needs
from ..cohort import Cohort
from . import Step, registry


@registry.register("adam", Needs(canonical=True))
def adam(
    cohort: Cohort,
    weights: Sequence[float],
    *,
    learning_rate: Annotated[float, Field(gt=0, le=100, description="η: step length, times the mean change.")] = 1e-2,
    beta1: Annotated[float, Field(ge=0, lt=1, description="Share of past changes that is kept.")] = 0.9,
    beta2: Annotated[float, Field(ge=0, lt=1, description="Share of their squares that is kept.")] = 0.99,
    tau: Annotated[float, Field(gt=0, le=1e6, description="τ: a change below it counts as small.")] = 1e-3,
) -> Step:
    """m ← β₁m + (1−β₁)d;  v ← β₂v + (1−β₂)d²;  x + η·m/(√v + τ), with v = τ² before the first round."""
    return adaptive(lambda v, squared: beta2 * v + (1 - beta2) * squared, learning_rate, beta1, tau)


def adaptive(square: Callable[[Tensor, Tensor], Tensor], learning_rate: float, beta1: float, tau: float) -> Step:
    """A step that divides by √v + τ, whatever v is."""

    def gain(v: Tensor | None) -> Tensor | float:
        assert v is not None
        return learning_rate / (v.sqrt() + tau)

    return Step(gain, keep=beta1, add=1 - beta1, square=square, first=tau**2)
