"""The workflow in which the sites' rows vote on synthetic rows: one message to each site, one noisy count from each.

What is chosen lies in the job's result as `synthetic.jsonl`, beside `rounds.jsonl`, which says who voted.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from pydantic import Field

from ..adapter import Adapter, AdapterUpdate, RoundTask
from ..aggregation.admit import Terms, check_terms, check_values
from ..config import RoundPlan, TaskPlan, VoteSettings
from ..errors import WireError
from ..files import write_text
from ..job.synthetic import FILE, check_votes, voting
from ..privacy.egress import VOTES
from ..synthesis import candidates
from ..synthesis.candidates import CandidateSet
from ..synthesis.choose import choose, threshold
from ..synthesis.tally import noise, tally
from . import wire
from .arguments import Arguments, taking
from .rounds import Rounds


class _Arguments(Arguments, VoteSettings):
    plan: Mapping[str, Any] | None = Field(None, description="What the sites are to vote on, and with which model.")


class SyntheticVotes(Rounds):
    """Has the sites' rows vote on the candidates that the job brings, and saves those that are chosen.

    Args:
        plan: a `config.RoundPlan`: `synthetic.digest` names the candidates, and `privacy` the noise on the votes.
        settings: those of `config.VoteSettings` (per_label, chance, min_responses, …).

    Raises:
        ConfigError: a setting nobody knows or a combination that cannot work; the job is refused while it loads.
    """

    @taking(VoteSettings)
    def __init__(self, plan: Mapping[str, Any] | None = None, **settings: Any) -> None:
        given = _Arguments.read({"plan": plan, **settings}, "controller")
        super().__init__("", num_rounds=1)
        self.num_rounds, self.plan = 1, dict(plan or {})
        self.__dict__.update({name: getattr(given, name) for name in VoteSettings.model_fields})
        self.settings = given
        self.asked = RoundPlan.read(self.plan, "plan")
        check_votes(self.asked)
        self.votes: dict[str, AdapterUpdate] = {}

    def _work(self) -> None:
        fobs.register(TensorDecomposer)
        rows = self._brought(self.asked.synthetic.digest)
        plan = voting(self.asked, rows)
        self.set_fl_context(FLModel(params={}, current_round=0, total_rounds=1))
        self.task = RoundTask(plan)
        sites = sorted(self._free())
        self._ask(self.task, wire.write_task(self.task), AppConstants.TASK_TRAIN, sites, partial(self._came, self.task))
        if self.abort_signal.triggered:
            return
        self._need(self.ledger.usable())
        chosen = chosen_of(rows, self.votes, plan, self.settings)
        write_text(Path(self.get_run_dir()) / FILE, candidates.write(chosen).decode())
        self.info(f"{len(self.votes)} sites voted; {len(chosen.rows)} of {len(rows.rows)} candidates are in {FILE}")
        self.ledger.voted(self.votes, len(chosen.rows))
        self._close()

    def _take(self, result: FLModel, trained_in: RoundTask | None = None) -> bool:
        site = result.meta["client_name"]
        if trained_in:
            return self._too_late(site)
        return self._counted(result, lambda: self.votes.update({site: read_vote(result, site, self.task)}))


def read_vote(result: FLModel, site: str, task: RoundTask) -> AdapterUpdate:
    """Read a site's vote.

    Raises:
        WireError: it is none: other tensors, not finite, too large, or under no noise.
    """
    update = wire.read_update(result, site, task.plan.labels, {VOTES})
    terms = Terms(task.plan.task, str(task.plan.peft["method"]), task.plan.fingerprint, pairs=False)
    check_terms(update, terms, Adapter(dense={VOTES: torch.zeros(task.plan.votes)}), None)
    check_values(update)
    if update.report.epsilon is None:
        raise WireError(f"{site} states no noise on its votes; update nvflare_fm there", code="votes_unprotected")
    tensor = update.adapter.dense[VOTES].float()
    return replace(update, adapter=Adapter(dense={VOTES: tensor}))


def chosen_of(
    rows: CandidateSet, votes: Mapping[str, AdapterUpdate], plan: TaskPlan, settings: VoteSettings
) -> CandidateSet:
    """Choose the candidates with the most votes, and note what they cost and where they come from."""
    total = tally({site: update.adapter.dense[VOTES] for site, update in votes.items()})
    least = threshold(noise(plan.privacy) * math.sqrt(len(votes)), settings.chance)
    places = choose(total, rows.labels, settings.per_label, least)
    epsilon = plan.privacy.epsilon or max(update.report.epsilon or 0.0 for update in votes.values())
    counted = [rows.rows[place].model_copy(update={"votes": min(float(total[place]), 1e12)}) for place in places]
    return CandidateSet(tuple(counted), rows.provenance.model_copy(update={"parent": rows.digest, "epsilon": epsilon}))
