"""The task's head alone at a site (settings: `job/peft/head.py`): what lies below it is computed once for each text."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...adapter import Adapter
from ...config import TaskPlan
from ...job.peft.head import Head
from . import Attachment, registry

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from ..model.base_model import BaseModel


@registry.register("head")
class HeadAttachment(Attachment):
    """Put a trainable copy of the head on a base model, and keep what the frozen rest makes of each text."""

    method: Head

    def attach(
        self, base: "BaseModel", start: Adapter, plan: TaskPlan, number: int = 0, own: Adapter | None = None
    ) -> "PeftModel":
        from ..model.states import States, freeze_backbone

        model = super().attach(base, start, plan, number, own)
        freeze_backbone(base, self.states or States())
        return model

    def prepare(
        self, base: "BaseModel", rows: "Dataset", chosen: Sequence[int], should_stop: Callable[[], bool]
    ) -> None:
        from ..model.states import prepare

        prepare(base, rows, chosen, should_stop)
