"""Where a task meets the site's word: decided before a trainer starts, and every decision in NVFlare's audit log."""

from pathlib import Path

from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.apis.utils.fl_context_utils import add_job_audit_event
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from ..config import SiteOverrides, TaskPlan
from ..errors import FmError, PolicyError
from ..job.at_home import at_home
from ..privacy.egress import Asked
from ..site.offer.policy import Decision, accept, decide
from ..site.offer.site_config import FILE_NAME, SiteConfig, load_site
from . import egress, wire
from .submitter import submitter


class Gate:
    """What a site file says to each task of a job.

    Args:
        site_file: read once; while it is faulty, again with each task, so that it can be mended.
        overrides, processes: what the job asks of this site alone.
    """

    def __init__(self, site_file: Path, overrides: SiteOverrides, processes: int) -> None:
        self.site_file, self.overrides, self.processes = site_file, overrides, processes
        self._config: SiteConfig | None = None

    @property
    def config(self) -> SiteConfig:
        """What the site file says.

        Raises:
            ConfigError: it is missing or faulty.
        """
        self._config = self._config or load_site(self.site_file)
        return self._config

    def decide(self, task_name: str, task: Shareable, fl_ctx: FLContext) -> Shareable | None:
        """Decide on a task of the server, and put the decision on record.

        Args:
            task: where it may be carried out, what was decided is put beside its plan, for the trainer.
        Returns:
            The reply where the site refuses; nothing where the trainer may have the task.
        """
        who, about, reply = submitter(fl_ctx), task_name, None
        try:
            model = FLModelUtils.from_shareable(task)
            if (asked := wire.read_plan(model)) is None:
                self._keep_submission()
                return None
            self._need_egress(fl_ctx)
            plan, trains = self.overrides.applied(asked), task_name == AppConstants.TASK_TRAIN
            sends = not (trains and wire.rounds_over(model))
            plan = plan if sends else at_home(plan)
            work = _work(plan)
            about = f"{work} with model {plan.model[:80]!r} on data {plan.data[:80]!r}"
            decision = accept(decide(plan, self.config, who, self.processes, trains, sends))
            _hand_over(decision, model, task)
            names = frozenset(name for name in model.params or {} if isinstance(name, str))
            of_round = Asked(decision.plan, model.current_round or 0, model.total_rounds or 1, names)
            fl_ctx.set_prop(egress.ASKED, of_round, private=True, sticky=False)
            said = str(decision)
        except FmError as error:
            said, reply = f"refused: {error}", _reply(error.message)
        except Exception as error:  # what cannot be decided is refused, and the job goes on elsewhere
            said = f"refused: internal error: {type(error).__name__}: {error}"
            reply = _reply(f"internal error: {type(error).__name__}; see the site's audit log")
        self._audit(f"{said} [{about}, for {who.name or 'unknown'} of {who.org or 'unknown'}]", fl_ctx)
        return reply

    def _need_egress(self, fl_ctx: FLContext) -> None:
        """A site with a floor works only where its filter looks at what leaves; simulated sites have no kit for one.

        Raises:
            PolicyError: it does not.
        """
        if self.config.privacy.floor and self.site_file.name == FILE_NAME and not egress.in_force(fl_ctx):
            raise PolicyError(
                "this site has a privacy floor, and its egress filter is not in force; its admin must run nvflare-fm "
                "site allow and restart the site",
                code="no_egress",
            )

    def _keep_submission(self) -> None:
        """Of submit_model, whose task holds no plan.

        Raises:
            PolicyError: the adapter that the trainer holds may be one that was not let out.
        """
        if self.config.privacy.floor:
            raise PolicyError(
                "this site has a privacy floor and submits no adapter of its own for others to measure; leave "
                "submit_model out, and measure the global adapter",
                code="submission_withheld",
            )

    def note(self, result: Shareable, fl_ctx: FLContext) -> None:
        """Puts on record what the trainer itself refused."""
        kind = result.get_header(ReservedHeaderKey.CONTENT_TYPE)
        if kind and (reason := wire.refused(FLModelUtils.from_shareable(result))):
            self._audit(f"refused by the trainer: {reason}", fl_ctx)

    @staticmethod
    def _audit(what: str, fl_ctx: FLContext) -> None:
        """One line, whatever a job's values hold: line breaks and terminal codes are written out, and it is cut."""
        add_job_audit_event(fl_ctx, msg=f"nvflare_fm {written_out(what)}")


def _work(plan: TaskPlan) -> str:
    if plan.votes:
        return f"a vote on {plan.votes} candidates for {plan.task}"
    return f"sums over features for {plan.task}" if plan.sums else plan.task


def written_out(text: str, most: int = 2000) -> str:
    """`text` without anything that is no printable character, and no longer than `most`."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def _hand_over(decision: Decision, model: FLModel, task: Shareable) -> None:
    """Puts a decision into `task`, whose content is `model`; its tensors stay where they are."""
    wire.write_decision(model, decision.plan, decision.lowered)
    dxo = from_shareable(task)
    dxo.meta = {**dxo.meta, wire.KEY: model.meta[wire.KEY]}
    dxo.update_shareable(task)


def _reply(reason: str) -> Shareable:
    model: FLModel = wire.write_refusal(reason)
    return FLModelUtils.to_shareable(model)
