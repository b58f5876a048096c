"""What attackers say of themselves: numbers that nobody can check."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from ...adapter import AdapterUpdate, Report
from . import Known, on_updates


@on_updates.register("lies")
def lies(
    known: Known,
    *,
    examples: Annotated[int, Field(ge=1, le=10**9, description="as many rows as it says it has")] = 10**9,
    loss: Annotated[float, Field(ge=0, le=1e9, description="of the adapter it received, as it says")] = 1e6,
) -> list[AdapterUpdate]:
    """The honest change with a report that would make it count most, and the worst round look best: many rows, one
    step, a high loss, and accuracies turned upside down. FedAvg (arXiv:1602.05629) weighs by such counts.
    """
    return [replace(update, report=_lie(update, examples, loss)) for update in known.own]


def _lie(update: AdapterUpdate, examples: int, loss: float) -> Report:
    report = update.report
    wrong = {name: 1 - value if 0 <= value <= 1 else -value for name, value in report.before.items()}
    return replace(report, examples=examples, tokens=examples, steps=1, loss=loss, before=wrong | {"loss": loss})
