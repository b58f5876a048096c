"""Keeps the global adapter on the server as PEFT folders: the last, the best and, on request, that of every round.

<run dir>/adapters/{last,best,round-000,…}/    <run dir>/artifact_manifest.json (for `nvflare job download`)
"""

import json
from dataclasses import replace
from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.model_desc import ModelDescriptor
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from pydantic import Field

from ..aggregation.step import Memory
from ..config import OptionalId, Rule
from ..errors import ConfigError
from ..export.folder import WEIGHTS, Saved, read_tensors, write_adapter
from ..files import write_text
from . import wire
from .arguments import Arguments
from .sealed import WEIGHTS as SEALED_WEIGHTS
from .sealed import is_sealed, read_any, sealed_tensors, write_sealed

FOLDER, LAST, BEST, MANIFEST = "adapters", "last", "best", "artifact_manifest.json"
REMEMBERED = "nvflare_fm.step"  # in the FLContext: the server step, and what it remembers after the round


class _Arguments(Arguments):
    keep_rounds: bool = Field(description="true: keep the adapter of every round, not only the last and the best.")
    initial_adapter: OptionalId = Field(
        description="Folder beside this file with the adapter to start from; empty: start afresh."
    )
    resume: bool = Field(
        description="true: go on counting rounds after those of the adapter. num_rounds is then that of all rounds."
    )


class AdapterPersistor(ModelPersistor):
    """Loads and saves the global adapter.

    Args:
        keep_rounds: also keep the adapter of every round.
        initial_adapter: a folder in the job's server config, as this class writes them; empty: start afresh.
            A name, not a path: a job cannot make the server read anything it did not bring.
        resume: continue the round count and the schedule after the initial adapter's round; otherwise a new
            federation starts from it.
    """

    def __init__(self, keep_rounds: bool = False, initial_adapter: str = "", resume: bool = False) -> None:
        super().__init__()
        _Arguments.check(locals(), "persistor")
        if resume and not initial_adapter:
            raise ConfigError("resume needs an initial_adapter to resume from", code="no_adapter")
        self.keep_rounds, self.initial_adapter, self.resume = keep_rounds, initial_adapter, resume

    def handle_event(self, event: str, fl_ctx: FLContext) -> None:
        if event == EventType.START_RUN:
            fobs.register(TensorDecomposer)
        elif event == AppEventType.GLOBAL_BEST_MODEL_AVAILABLE:
            self._write(fl_ctx.get_prop(AppConstants.GLOBAL_MODEL), BEST, fl_ctx)

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """The initial adapter, or nothing: round 0 needs none."""
        if not self.initial_adapter:
            return make_model_learnable({}, {})
        saved = read_any(self._brought(fl_ctx))
        if self.resume and saved.round is None:
            raise ConfigError(
                f"initial_adapter {self.initial_adapter!r} does not say its round, so nothing can resume",
                code="adapter_without_round",
            )
        if self.resume:
            fl_ctx.set_prop(REMEMBERED, (saved.step, saved.memory), private=True, sticky=False)
        self.logger.info(f"starting from {self.initial_adapter!r}, of round {saved.round}, resume={self.resume}")
        model = wire.write_saved(saved if self.resume else Saved(saved.adapter, saved.manifest))
        return make_model_learnable(model.params, model.meta)

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Saves `model` and has it read from its own file from then on: the next merge holds the new adapter alone."""
        step, memory = fl_ctx.get_prop(REMEMBERED) or (None, Memory())
        self._write(model, LAST, fl_ctx, step, memory)
        if self.keep_rounds:
            self._write(model, f"round-{fl_ctx.get_prop(AppConstants.CURRENT_ROUND):03d}", fl_ctx, step, memory)
        if weights := model[ModelLearnableKey.WEIGHTS]:
            last = _adapters(fl_ctx) / LAST
            weights.update(sealed_tensors(last) if is_sealed(last) else read_tensors(last))  # mapped, not copied

    def get_model_inventory(self, fl_ctx: FLContext) -> dict[str, ModelDescriptor]:
        """The adapters saved in this job, and the one it brought."""
        folders = sorted(f for f in _adapters(fl_ctx).glob("[!.]*") if (f / WEIGHTS).is_file() or is_sealed(f))
        if self.initial_adapter:
            folders = [self._brought(fl_ctx), *folders]
        return {f.name: ModelDescriptor(name=f.name, location=str(f), model_format="peft") for f in folders}

    def get_model(self, model_file: str, fl_ctx: FLContext) -> ModelLearnable:
        known = self.get_model_inventory(fl_ctx)
        if model_file not in known:
            raise ConfigError(f"no adapter {model_file!r} is saved, only {sorted(known)}", code="no_such_adapter")
        model = wire.write_saved(read_any(Path(known[model_file].location)))
        return make_model_learnable(model.params, model.meta)

    def _brought(self, fl_ctx: FLContext) -> Path:
        workspace = fl_ctx.get_engine().get_workspace()
        return Path(workspace.get_app_config_dir(fl_ctx.get_job_id())) / self.initial_adapter

    def _write(
        self,
        model: ModelLearnable,
        name: str,
        fl_ctx: FLContext,
        step: Rule | None = None,
        memory: Memory | None = None,
    ) -> None:
        saved = wire.read_saved(model[ModelLearnableKey.WEIGHTS], model[ModelLearnableKey.META], "the server")
        if saved is None:
            return
        folder = _adapters(fl_ctx) / name
        if saved.adapter.sealed:
            write_sealed(folder, model[ModelLearnableKey.WEIGHTS], model[ModelLearnableKey.META])
        else:
            write_adapter(folder, replace(saved, step=step, memory=memory or Memory()))
        self.logger.info(f"saved adapter {name} of round {saved.round}")
        best = folder.with_name(BEST)
        chosen = best if best.exists() else folder.with_name(LAST)
        file = SEALED_WEIGHTS if saved.adapter.sealed else WEIGHTS
        listed = {"schema_version": "1", "artifacts": {"global_model": f"{FOLDER}/{chosen.name}/{file}"}}
        write_text(folder.parent.parent / MANIFEST, json.dumps(listed, indent=2) + "\n")


def _adapters(fl_ctx: FLContext) -> Path:
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())) / FOLDER
