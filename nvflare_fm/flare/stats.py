"""Answers `nvflare job monitor` and `nvflare job stats`: the round, the metrics, who is in and why others are not.

A lead scientist may not read the sites' job logs; this is where the reasons reach them.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.widgets.info_collector import GroupInfoCollector, InfoCollector
from nvflare.widgets.widget import Widget

from . import wire

PROGRESS = "nvflare_fm.progress"  # the controller leaves its account here
TOLD = "nvflare_fm.told"  # when somebody last asked for it
_ASKED_EVERY_S = 10.0  # by `nvflare job monitor`
REFUSED = "cross_val_refused.json"  # beside NVFlare's cross_val_results.json, where a refusal is an empty entry


class RoundStats(Widget):
    """Answer `nvflare job monitor` and `nvflare job stats`, and record evaluations that sites refused."""

    def __init__(self) -> None:
        super().__init__()
        self._refused: dict[str, dict[str, str]] = {}  # site → adapter → why it was not measured there

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == InfoCollector.EVENT_TYPE_GET_STATS:
            self._tell(fl_ctx)
        elif event_type == AppEventType.VALIDATION_RESULT_RECEIVED:
            self._note(fl_ctx)

    def _tell(self, fl_ctx: FLContext) -> None:
        fl_ctx.set_prop(TOLD, time.monotonic(), private=True, sticky=True)
        collector = fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR)
        refused = {f"refused by {site}": "; ".join(set(why.values())) for site, why in sorted(self._refused.items())}
        progress = {**(fl_ctx.get_prop(PROGRESS) or {}), **refused}
        if isinstance(collector, GroupInfoCollector) and progress:
            collector.add_info("nvflare_fm", progress)

    def _note(self, fl_ctx: FLContext) -> None:
        """Of cross-site evaluation: NVFlare keeps the metrics, and of a site that has none, not the reason."""
        site, adapter = fl_ctx.get_prop(AppConstants.DATA_CLIENT), fl_ctx.get_prop(AppConstants.MODEL_OWNER)
        result = fl_ctx.get_prop(AppConstants.VALIDATION_RESULT)
        if not (reason := _reason(result)):
            return
        self.log_warning(fl_ctx, f"{site} does not measure adapter {adapter}: {reason}", fire_event=False)
        self._refused.setdefault(site, {})[adapter] = reason
        workspace = fl_ctx.get_engine().get_workspace()
        folder = Path(workspace.get_run_dir(fl_ctx.get_job_id())) / AppConstants.CROSS_VAL_DIR
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REFUSED).write_text(json.dumps(self._refused, indent=2, sort_keys=True) + "\n")


def let_be_seen(fl_ctx: FLContext, stop: Callable[[], bool], failed: bool = False) -> None:
    """Keep a job that is about to end until who watches it has been told the last account: a monitor is told nothing
    of a job that has ended. Where nobody has asked lately, nobody is waited for.

    Args:
        stop: whether to give up waiting.
        failed: it is kept even where nobody has asked yet. A monitor that has asked while the job was being deployed
            was told nothing, and asks again only later.
    """
    if fl_ctx.get_prop(FLContextKey.SIMULATE_MODE):
        return
    asked, now = fl_ctx.get_prop(TOLD), time.monotonic()
    is_watched = failed if asked is None else now - asked < 2 * _ASKED_EVERY_S
    waits_s = 1.5 * _ASKED_EVERY_S if is_watched else 0
    while time.monotonic() < now + waits_s and fl_ctx.get_prop(TOLD) == asked and not stop():
        time.sleep(0.1)


def _reason(result: Shareable | None) -> str | None:
    code = None if result is None else result.get_return_code()
    if type(code) is not str or code != ReturnCode.OK:
        return "its trainer ended or could not start"
    try:
        return wire.refused(FLModelUtils.from_shareable(result))
    except Exception as error:  # what a site sends is NVFlare's to read, and it raises many kinds
        return f"malformed message ({type(error).__name__})"
