"""How a site puts a PEFT method on its base model, fits a global adapter into it, and takes the trained one off again.

The methods, their settings and promises are those of `nvflare_fm.job.peft`. PEFT's own way does for most of them; a
method that needs another has a module of its name here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...adapter import Adapter
from ...config import Factors, TaskPlan
from ...job import peft as methods
from ...job.peft import PeftMethod
from ...registry import Registry

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel

    from ..model.base_model import BaseModel
    from ..model.states import States


class Attachment:
    """One method at a site, in PEFT's own way. PEFT is imported only when a site calls it.

    Args:
        states: where what stays frozen below a head is kept; None: nothing is.
    """

    def __init__(self, method: PeftMethod, states: "States | None" = None) -> None:
        self.method, self.states = method, states

    def config(self, base: "BaseModel") -> "PeftConfig":
        """Make PEFT's configuration of the trained adapter."""
        from peft import get_peft_config

        values = {"peft_type": self.method.peft_type, "task_type": base.task.promises.peft_type}
        config: PeftConfig = get_peft_config(values | self.method.arguments(base.heads))
        return config

    def initialise(self, model: "PeftModel", seed: int) -> None:
        """Make the start that all sites share, where PEFT's own is random."""
        from ..model.attach import fill_prompt

        if self.method.virtual_tokens:
            fill_prompt(model, seed)

    def attach(
        self, base: "BaseModel", start: Adapter, plan: TaskPlan, number: int = 0, own: Adapter | None = None
    ) -> "PeftModel":
        """Put an adapter called "local" on `base.model`, trainable, that holds `start` (empty: made from the seed).

        Args:
            plan: its `rest` says what of `start` rides along frozen, its `factors` what is trained.
            number: of the round; a site that trains a fresh pair every round has other directions in each.
            own: this site's adapter, where the plan shares only a part of it.

        Raises:
            ConfigError: the method cannot be put on this model, or cannot hold `start`.
            WireError: `start` belongs to another model.
        """
        from ..model.attach import check_fits, put, wrap

        model = wrap(base, self.config(base), plan.seed)
        self.initialise(model, plan.seed)
        if start:
            put(model, start.tensors())
        check_fits(model, base)
        return model

    def prepare(
        self, base: "BaseModel", rows: "Dataset", chosen: Sequence[int], should_stop: Callable[[], bool]
    ) -> None:
        """Compute ahead what the base model makes of rows, where the method leaves that as it is.

        Args:
            base: lent, with the adapter.
            rows: tokenized.
            chosen: their numbers.
            should_stop: whether to leave it at what is done.
        """

    def leave_rest(self, model: "PeftModel", factors: Factors) -> None:
        """Take off what rides along frozen, if anything does, and leave the trained adapter as it is.

        Args:
            factors: those that are trained.
        """

    def extract(self, model: "PeftModel", whole: bool = False) -> Adapter:
        """Copy what travels: the trained adapter, on the CPU in float32. `whole`: frozen directions included."""
        from ..model.attach import tensors

        return Adapter(dense=tensors(model))


registry: Registry[type[Attachment]] = Registry("PEFT method", __name__)


def attachment_of(peft: Mapping[str, Any], states: "States | None" = None) -> Attachment:
    """Find how a site puts on the method that `{"method": name, …}` describes.

    Args:
        states: see `Attachment`.

    Raises:
        ConfigError: an unknown method or setting, with the nearest known one.
    """
    method = methods.read(peft)
    name = str(peft["method"])
    return registry[name](method, states) if name in set(registry) else Attachment(method, states)
