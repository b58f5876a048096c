"""LoRA at a site, with rsLoRA's scale or DoRA's magnitudes (settings: `job/peft/lora.py`).

A site of rank r trains the first r directions of the global adapter. The others ride along as a second, frozen LoRA
adapter, so that every site starts a round at exactly the global adapter, whatever its rank.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...adapter import Adapter, LoraPair, from_tensors
from ...aggregation.merge.zero_pad import pad
from ...algebra.lora import fresh_rows, head, refill, stack, tail, zero
from ...config import Factors, TaskPlan
from ...errors import ConfigError, WireError
from ...job.peft.lora import Lora
from ..model.own_adapter import joined
from . import Attachment, registry

if TYPE_CHECKING:
    from peft import PeftModel

    from ..model.base_model import BaseModel


@registry.register("lora")
class LoraAttachment(Attachment):
    """Put LoRA on a base model, with the frozen rest of the global adapter beside it, and take it off again."""

    method: Lora

    def attach(
        self, base: "BaseModel", start: Adapter, plan: TaskPlan, number: int = 0, own: Adapter | None = None
    ) -> "PeftModel":
        from ..model.attach import freeze, put, wrap

        if self.method.use_dora and base.quantization == "int8" and base.model.device.type == "cpu":
            raise ConfigError(  # PEFT reads the weights, and takes them from their scales
                "DoRA does not work on an int8 base model on a CPU; use nf4, plain LoRA, or a GPU", code="dora_on_int8"
            )
        model = wrap(base, self.config(base), plan.seed)
        blank = self.extract(model)
        if any("lora_embedding_" in name for name in blank.dense):
            raise ConfigError(
                "peft.target_modules: LoRA on an embedding has factors that no merge rule adds up; name linear layers, "
                "or train the embedding whole (modules_to_save)",
                code="embedding_factors",
            )
        if plan.shares == "A" and start:
            start = joined(start, own or blank)
        start = start or Adapter({layer: zero(*blank.lora[layer].shape) for layer in blank.lora}, blank.dense)
        _check_layers(start, blank)
        widest = max(pair.rank for pair in start.lora.values())
        if self.method.use_dora and widest not in (0, self.method.rank):
            raise ConfigError(
                "DoRA needs one rank everywhere, and the adapter has another than this site is to train",
                f"this site trains {self.method.rank}, the adapter has {widest}",
                code="one_rank",
            )
        trained, frozen = self._split(start, plan, number)
        put(model, Adapter(trained, start.dense).tensors())
        if widest := max(pair.rank for pair in frozen.values()):
            self._add_rest(model, frozen, widest)
        freeze(model, plan.factors)
        return model

    def _split(self, start: Adapter, plan: TaskPlan, number: int) -> tuple[dict[str, LoraPair], dict[str, LoraPair]]:
        """What of `start` is trained, at this site's rank and scale, and what rides along frozen."""
        if plan.rest == "all":
            rows = range(number * self.method.rank, (number + 1) * self.method.rank)
            fresh = {n: fresh_rows(n, p.shape[1], rows, plan.seed, beside=p.A) for n, p in start.lora.items()}
            columns = {n: p.B.new_zeros(p.shape[0], self.method.rank) for n, p in start.lora.items()}
            return {n: LoraPair(a, columns[n], self.method.scale) for n, a in fresh.items()}, dict(start.lora)
        kept = {n: refill(head(p, self.method.rank), self.method.rank, n, plan.seed) for n, p in start.lora.items()}
        beside = {n: tail(p, self.method.rank if plan.rest == "tail" else p.rank) for n, p in start.lora.items()}
        return {n: p.rescaled(self.method.scale) for n, p in kept.items()}, beside

    def _add_rest(self, model: "PeftModel", pairs: Mapping[str, LoraPair], rank: int) -> None:
        from peft import LoraConfig, PeftModel

        from ..model.attach import LOCAL, PREFIX, REST, put

        # The very layers of the pairs: what PEFT resolved for "local" may name heads, which are trained whole there.
        targets = "|".join(re.escape(layer.removeprefix(PREFIX)) for layer in pairs)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)  # scale 1
        PeftModel.add_adapter(model, REST, config)
        frozen = {n: pad(p, rank).rescaled(1.0) for n, p in pairs.items()}
        put(model, Adapter(frozen).tensors(), REST)
        model.base_model.set_adapter([LOCAL, REST])
        for name, parameter in model.named_parameters():
            if f".{REST}." in name:
                parameter.requires_grad_(False)

    def leave_rest(self, model: "PeftModel", factors: Factors) -> None:
        from ..model.attach import LOCAL, REST, freeze

        if REST in model.peft_config:
            model.delete_adapter(REST)
            model.base_model.set_adapter(LOCAL)
            freeze(model, factors)

    def extract(self, model: "PeftModel", whole: bool = False) -> Adapter:
        from ..model.attach import REST, tensors

        values = tensors(model)
        layers = {n.rpartition(".lora_A.")[0] for n in values if ".lora_A." in n}
        adapter = from_tensors(values, dict.fromkeys(layers, self.method.scale), "this site")
        pairs = {n: adapter.lora[n] for n in adapter.lora}
        if whole and REST in model.peft_config:
            frozen = from_tensors(tensors(model, REST), dict.fromkeys(layers, 1.0), "this site").lora
            pairs = {n: stack([pairs[n], frozen[n]], [1.0, 1.0]) for n in pairs}
        return Adapter(pairs, {n: adapter.dense[n] for n in adapter.dense})


def _check_layers(start: Adapter, blank: Adapter) -> None:
    for layer in sorted({*start.lora, *blank.lora}):
        theirs, ours = (a.lora[layer].shape if layer in a.lora else None for a in (start, blank))
        if theirs != ours:
            raise WireError(
                f"the global adapter has {theirs or 'nothing'} for {layer!r}, this site's model {ours or 'nothing'}; "
                "do base model and target_modules agree?",
                code="adapter_misfit",
            )
