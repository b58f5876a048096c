"""Which classes a job may build, by their dotted names: the one list that kits, job reading, docs and tests go by.

Names and no classes, so that a site's processes can read the list without loading torch.
"""

import importlib
from typing import Any

SERVER = (
    "nvflare_fm.flare.controller.FedPEFT",
    "nvflare_fm.flare.aggregator.AdapterAggregator",
    "nvflare_fm.flare.persistor.AdapterPersistor",
    "nvflare_fm.flare.locator.AdapterLocator",
    "nvflare_fm.flare.stats.RoundStats",
    "nvflare_fm.flare.votes.SyntheticVotes",
)
SITE = ("nvflare_fm.flare.executor.PeftExecutor",)
OURS = (*SERVER, *SITE)

# What recipes and templates use of NVFlare's own. Their arguments name no path outside the job's folder and no address;
# a receiver for MLflow or Weights & Biases would send to an address that the job chooses.
NVFLARE_SERVER = (
    "nvflare.app_common.workflows.cross_site_model_eval.CrossSiteModelEval",
    "nvflare.app_common.workflows.global_model_eval.GlobalModelEval",
    "nvflare.app_common.widgets.validation_json_generator.ValidationJsonGenerator",
    "nvflare.app_common.widgets.metrics_artifact_writer.MetricsArtifactWriter",
    "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver",
)
NVFLARE_SITE = ("nvflare.app_common.widgets.convert_to_fed_event.ConvertToFedEvent",)
# NVFlare puts it into every job at a site that streams its logs, and the job would be refused without it.
NVFLARE_STREAMING_SITE = (*NVFLARE_SITE, "nvflare.app_common.logging.job_log_streamer.JobLogStreamer")


def load(name: str) -> Any:
    """The class that one of these names stands for."""
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), kind)
