"""Hands adapters to NVFlare's cross-site evaluation: the last and the best of this job, or the one the job brings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.abstract.model_locator import ModelLocator
from pydantic import Field

from ..config import (
    LENGTH,
    MANY,
    ROWS,
    EvaluationSettings,
    Name,
    Quantization,
    Settings,
    TaskPlan,
    Text,
    TrainingSettings,
)
from ..errors import ConfigError
from . import wire
from .arguments import Arguments, Id
from .persistor import BEST, LAST, AdapterPersistor


class Measurement(Settings):
    """On what a finished adapter is measured. None: as it was trained, by its provenance."""

    model: Text | None = Field(
        None, description="Alias of the base model in the sites' fm_site.yaml.", examples=["base"]
    )
    data: Text | None = Field(None, description="Alias of the data set in the sites' fm_site.yaml.", examples=["notes"])
    quantization: Quantization | None = Field(
        None, description="Precision of the frozen base model: nf4, fp4, int8, bf16, fp16 or fp32.", examples=["nf4"]
    )
    max_length: int | None = Field(
        None, ge=8, le=LENGTH, description="Tokens of a text; longer texts are cut.", examples=[1024]
    )
    batch_size: int = Field(16, ge=1, le=ROWS, description="Rows per batch.")
    max_examples: int = Field(0, ge=0, le=MANY, description="Most validation rows to measure on; 0: all.")
    template: Name = Field("", description="Name of the job template; a site may accept some templates only.")

    def applied(self, plan: TaskPlan | None) -> TaskPlan:
        """The plan an adapter was trained by, turned into one that trains nothing. Its rank is free to be lowered:
        what a site does not hold as trained rides along frozen. Limits on training do not bite, and nothing is sent
        that could be encrypted.

        Raises:
            ConfigError: the adapter does not say how it was trained.
        """
        if plan is None:
            raise ConfigError(
                "the adapter's provenance.json does not hold the plan it was trained by, so no site can be told how to "
                "measure it; take an adapter that a job of nvflare_fm has made",
                code="adapter_without_plan",
            )
        given = self.model_dump(exclude_none=True, exclude={"batch_size", "max_examples"})
        evaluation = EvaluationSettings(batch_size=self.batch_size, max_examples=self.max_examples)
        idle = TrainingSettings(local_steps=1, batch_size=1)
        return plan.model_copy(
            update={**given, "evaluation": evaluation, "training": idle, "negotiable": ("rank",), "uplink": ()}
        )


class _Arguments(Arguments):
    persistor_id: Id = Field(description="Id of the AdapterPersistor among the components.")
    measurement: Mapping[str, Any] | None = Field(
        description="What differs from the plan by which the adapter was trained; unset: measure this job's adapters."
    )


class AdapterLocator(ModelLocator):
    """Finds the adapters that are to be measured.

    Args:
        persistor_id: the `AdapterPersistor` whose adapters are evaluated.
        measurement: what is asked differently from the plan the adapter was trained by, see `Measurement`. None: the
            adapters of this very job, by its own plan.

    Raises:
        ConfigError: a setting nobody knows; the job is refused while it loads.
    """

    def __init__(self, persistor_id: str = "persistor", measurement: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        _Arguments.check(locals(), "locator")
        self.persistor_id, self.measurement = persistor_id, measurement
        self.asks = None if measurement is None else Measurement.read(measurement, "measurement")

    def get_model_names(self, fl_ctx: FLContext) -> list[str]:
        if self.asks is None:
            return [name for name in (BEST, LAST) if name in self._persistor(fl_ctx).get_model_inventory(fl_ctx)]
        if brought := self._persistor(fl_ctx).initial_adapter:
            return [brought]
        raise ConfigError(
            "the job brings no adapter to evaluate; set the persistor's initial_adapter", code="no_adapter"
        )

    def locate_model(self, model_name: str, fl_ctx: FLContext) -> DXO:
        learnable = self._persistor(fl_ctx).get_model(model_name, fl_ctx)
        weights, meta = learnable[ModelLearnableKey.WEIGHTS], learnable[ModelLearnableKey.META]
        if self.asks is not None and (saved := wire.read_saved(weights, meta, "the persistor")):
            meta = wire.write_saved(replace(saved, plan=self.asks.applied(saved.plan))).meta
        return DXO(DataKind.WEIGHTS, data=weights, meta=meta)

    def _persistor(self, fl_ctx: FLContext) -> AdapterPersistor:
        component = fl_ctx.get_engine().get_component(self.persistor_id)
        if not isinstance(component, AdapterPersistor):
            raise ConfigError(
                f"{self.persistor_id!r} is not an AdapterPersistor; name the job's persistor here",
                code="wrong_component",
            )
        return component
