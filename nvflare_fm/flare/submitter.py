"""Who submitted a job, as NVFlare's server authenticated them."""

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey

from ..site.offer.policy import Submitter


def submitter(fl_ctx: FLContext) -> Submitter:
    """Who submitted the job; nobody in the simulator."""
    meta = fl_ctx.get_prop(FLContextKey.JOB_META) or {}
    return Submitter(meta.get(JobMetaKey.SUBMITTER_NAME.value, ""), meta.get(JobMetaKey.SUBMITTER_ORG.value, ""))
