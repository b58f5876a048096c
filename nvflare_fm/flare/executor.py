"""Trains in a process of its own: if that dies, the site misses a round and the federation goes on.

A thin `ClientAPIExecutor`. The job chooses values; the command is fixed: the site's installed package chooses the code.
"""

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DXO
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedTopic, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.executors.client_api.backend_spec import ClientAPIBackendContext
from nvflare.app_common.executors.client_api.cell_backend import CellSession
from nvflare.app_common.executors.client_api.external_process_backend import ExternalProcessBackend
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.client.config import ExchangeFormat
from nvflare.fuel.utils import fobs
from pydantic import Field

from ..config import A_YEAR, SiteOverrides
from ..errors import FmError
from ..site.offer import secret
from ..site.offer.site_config import FILE_NAME
from . import wire
from .arguments import Arguments
from .egress import Egress, in_force
from .gate import Gate

TRAINER = "nvflare_fm.flare.trainer"
_HANGS_AFTER_S = 300.0  # loading a large model can hold the interpreter for minutes; a death is seen at once
_STOPS_WITHIN_S = 10.0  # from SIGTERM to SIGKILL


class _Arguments(Arguments):
    processes: int = Field(ge=1, le=64, description="Trainer processes at a site, one GPU each.")
    launch_timeout_s: float = Field(
        gt=0, le=A_YEAR, description="Seconds a trainer may take to start; it loads the base model after that."
    )
    settings: Mapping[str, Any] | None = Field(description="What differs at the site from the plan.")


class PeftExecutor(ClientAPIExecutor):
    """Serves train, validate and submit_model.

    Args:
        processes: trainer processes at the site, one GPU each; more than one run under `torch.distributed.run`.
        launch_timeout_s: for the trainer to report for duty; it loads the base model only after that.
        settings: a `config.SiteOverrides`: what the site does differently from the plan.

    Raises:
        ConfigError: a value that is out of range.
    """

    def __init__(
        self, processes: int = 1, launch_timeout_s: float = 600.0, settings: Mapping[str, Any] | None = None
    ) -> None:
        _Arguments.check(locals(), "executor")
        self.processes, self.launch_timeout_s = processes, launch_timeout_s
        self.settings = dict(settings or {})  # as given: NVFlare writes it into the job
        self.overrides = SiteOverrides.read(self.settings, "executor")
        self._at: tuple[str | None, Signal] = None, Signal()  # the task we work at, and what stops it
        super().__init__(
            execution_mode=ExecutionMode.EXTERNAL_PROCESS,
            command=self._argv("", "", ""),
            launch_timeout=launch_timeout_s,
            stop_grace_period=_STOPS_WITHIN_S,
            heartbeat_timeout=_HANGS_AFTER_S,
            params_exchange_format=ExchangeFormat.PYTORCH,
            server_expected_format=ExchangeFormat.PYTORCH,
        )

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            fobs.register(TensorDecomposer)
            local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
            site_file = local / f"{fl_ctx.get_identity_name()}.{FILE_NAME}"  # simulated sites share one folder
            site_file = site_file if site_file.exists() else local / FILE_NAME
            workspace, job = fl_ctx.get_engine().get_workspace(), fl_ctx.get_job_id()
            self._command = self._argv(str(site_file), workspace.get_run_dir(job), workspace.get_app_config_dir(job))
            self._gate = Gate(site_file, self.overrides, self.processes)
            self._egress = Egress(site_file, lambda: self._gate.config)
            _limit_threads(self._gate)
            with contextlib.suppress(FmError):  # a site without a secret is the trainer's to report
                secret.make(site_file)
            serve_the_server_only(fl_ctx.get_engine())
            fl_ctx.get_engine().register_aux_message_handler(wire.ROUND_OVER, self._call_off)
        super().handle_event(event_type, fl_ctx)

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        self._at = fl_ctx.get_prop(FLContextKey.TASK_ID), abort_signal
        if refusal := self._gate.decide(task_name, shareable, fl_ctx):
            return refusal
        result = super().execute(task_name, shareable, fl_ctx, abort_signal)
        self._gate.note(result, fl_ctx)
        return result if in_force(fl_ctx) else self._egress.process(result, fl_ctx)

    def fire_log_analytics(self, fl_ctx: FLContext, dxo: DXO) -> None:
        """Metrics that are streamed while a trainer works pass no filter: at a site with a floor they stay here."""
        with contextlib.suppress(FmError):
            if self._gate.config.privacy.floor is None:
                super().fire_log_analytics(fl_ctx, dxo)

    def _call_off(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """The server has ended a round: if we are still at its task, we stop.

        NVFlare passes on messages between sites, and what one says of its sender is the sender's own word. But the name
        of a task is random and sent to its site alone, so who knows it is the server.
        """
        task, abort_signal = self._at
        if task and task == request.get_header(ReservedHeaderKey.TASK_ID):
            abort_signal.trigger("the round is over")
        return make_reply(ReturnCode.OK)

    def _argv(self, site_file: str, job_folder: str, config_folder: str) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        return [
            sys.executable,
            *(launcher if self.processes > 1 else []),
            *("-m", TRAINER, "--site-file", site_file, "--job-folder", job_folder, "--config-folder", config_folder),
        ]

    def _create_external_process_backend(self) -> ExternalProcessBackend:
        return RelaunchingBackend()


def serve_the_server_only(engine: Any) -> None:
    """Carry out only tasks that this site fetched from the server: NVFlare also takes them from messages, and any other
    site may send those.
    """
    engine.aux_runner.topic_table.pop(ReservedTopic.DO_TASK)


def _limit_threads(gate: Gate) -> None:
    """Libraries read these when they load, so they must be there before the trainer starts."""
    with contextlib.suppress(FmError):  # a faulty site file is the trainer's to report
        if threads := gate.config.limits.threads:
            os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))


class RelaunchingBackend(ExternalProcessBackend):
    """One trainer for many tasks, and a new one where the last has died, hung or been told to give up a task.

    NVFlare's own either starts a trainer for every task, or lets a site that lost its trainer fail for ever.
    """

    _abort: bool  # upstream's: nothing more is asked of the trainer, for this reason
    _abort_reason: str | None

    def __init__(self) -> None:
        super().__init__()
        self._given_up: CellSession | None = None

    def initialize(self, context: ClientAPIBackendContext, fl_ctx: FLContext) -> None:
        """Without a launch: a trainer that cannot start costs its site a round, and not the whole job."""
        super().initialize(replace(context, launch_once=False), fl_ctx)
        self._context = context

    def _send_abort(self, session: CellSession | None, reason: str) -> None:
        self._given_up = session
        super()._send_abort(session, reason)

    def _execute_admitted_task(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        if self._terminal_intent is None and not abort_signal.triggered:
            self._ensure_trainer(abort_signal)
        return super()._execute_admitted_task(task_name, shareable, fl_ctx, abort_signal)

    def _ensure_trainer(self, abort_signal: Signal) -> None:
        trainer: Any = self._active_launch
        if trainer is not None:
            error = self._trainer_liveness_error(trainer)
            if trainer.ready.is_set() and trainer is not self._given_up and not error and not self._abort:
                return
            self.logger.info(f"replacing the trainer: {error or self._abort_reason or 'it gave up its last task'}")
            self._stop_trainer(trainer, natural_exit_wait=0.0)
        self._abort, self._abort_reason, self._given_up = False, None, None
        try:
            self._launch_trainer(timeout=self._context.launch_timeout, abort_signal=abort_signal)
        except Exception as error:
            self.logger.error(f"the trainer cannot start: {error}")
