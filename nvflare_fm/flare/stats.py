"""Answers `nvflare job monitor` and `nvflare job stats`: the round, the metrics, who is in and why others are not.

A lead scientist may not read the sites' job logs; this is where the reasons reach them.
"""

from nvflare.apis.fl_context import FLContext
from nvflare.widgets.info_collector import GroupInfoCollector, InfoCollector
from nvflare.widgets.widget import Widget

PROGRESS = "nvflare_fm.progress"  # the controller leaves its account here


class RoundStats(Widget):
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type != InfoCollector.EVENT_TYPE_GET_STATS:
            return
        collector, progress = fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR), fl_ctx.get_prop(PROGRESS)
        if isinstance(collector, GroupInfoCollector) and progress:
            collector.add_info("nvflare_fm", progress)
