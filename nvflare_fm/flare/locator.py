"""Hands the last and the best adapter to NVFlare's `CrossSiteModelEval`."""

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.abstract.model_locator import ModelLocator

from ..errors import ConfigError
from .persistor import BEST, LAST, AdapterPersistor


class AdapterLocator(ModelLocator):
    """
    Args:
        persistor_id: the `AdapterPersistor` whose adapters are evaluated.
    """

    def __init__(self, persistor_id: str = "persistor") -> None:
        super().__init__()
        self.persistor_id = persistor_id

    def get_model_names(self, fl_ctx: FLContext) -> list[str]:
        return [name for name in (BEST, LAST) if name in self._persistor(fl_ctx).get_model_inventory(fl_ctx)]

    def locate_model(self, model_name: str, fl_ctx: FLContext) -> DXO:
        learnable = self._persistor(fl_ctx).get_model(model_name, fl_ctx)
        weights, meta = learnable[ModelLearnableKey.WEIGHTS], learnable[ModelLearnableKey.META]
        return DXO(DataKind.WEIGHTS, data=weights, meta=meta)

    def _persistor(self, fl_ctx: FLContext) -> AdapterPersistor:
        component = fl_ctx.get_engine().get_component(self.persistor_id)
        if not isinstance(component, AdapterPersistor):
            raise ConfigError(f"{self.persistor_id!r} is not an AdapterPersistor; name the job's persistor here")
        return component
