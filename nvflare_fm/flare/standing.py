"""Who is still at which round: tasks that sites work on after their round has ended.

NVFlare throws away the answer to a task that is over, so a slow site's task stays beside those of later rounds.
"""

from dataclasses import dataclass

from nvflare.apis.controller_spec import Task
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from ..adapter import RoundTask


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class SentTask:
    """What sites were sent for a round, as we and as NVFlare know it."""

    round: RoundTask
    task: Task

    def working(self) -> set[str]:
        """Sites that have not answered and still may."""
        answered = {each.client.name for each in self.task.client_tasks if each.result_received_time}
        return set() if self.task.completion_status else set(self.task.targets) - answered


class StandingTasks:
    """The tasks that are not over for every site.

    Args:
        max_staleness: an answer counts up to so many rounds late.
        total_rounds: of the federation; after the last, nothing counts.
    """

    def __init__(self, max_staleness: int, total_rounds: int) -> None:
        self.max_staleness, self.total_rounds = max_staleness, total_rounds
        self._sent: list[SentTask] = []

    def add(self, sent: SentTask) -> None:
        self._sent.append(sent)

    def working(self) -> set[str]:
        """Sites that are at a task of any round."""
        return {site for sent in self._sent for site in sent.working()}

    def counts(self, trained_in: RoundTask, number: int) -> bool:
        """Whether an answer to the earlier round `trained_in` still counts in round `number`.

        In a round that started without an adapter, a change has nothing that it could be told from.
        """
        in_time = number - trained_in.round <= self.max_staleness
        return bool(trained_in.adapter) and number < self.total_rounds and in_time

    def end_round(self, number: int) -> list[Task]:
        """End round `number`: who has not fetched its task gets the next round's instead.

        Returns:
            The tasks that are over: nobody works on them, or the answers would come too late to count.
        """
        for sent in self._sent:
            sent.task.targets = [fetched.client.name for fetched in sent.task.client_tasks]
        over = [sent for sent in self._sent if not (sent.working() and self.counts(sent.round, number + 1))]
        self._sent = [sent for sent in self._sent if sent not in over]
        return [sent.task for sent in over]


def call_offs(task: Task) -> dict[str, Shareable]:
    """For each site that still works on `task`, a message with the task's id, which nobody else was told.

    NVFlare tells nobody that a task is over: a slow site would train for nothing, and miss the next round too.
    """
    messages = {}
    for fetched in task.client_tasks:
        if not fetched.result_received_time and not task.completion_status:
            messages[fetched.client.name] = message = Shareable()
            message.set_header(ReservedHeaderKey.TASK_ID, fetched.id)
    return dict(sorted(messages.items()))
