"""What a site does for itself once the rounds are over: the job's plan, without all that is there for others."""

from ..config import PrivacySettings, SyntheticSettings, TaskPlan

PERSONAL = "personal_adapter"  # the folder of what a site has trained on for itself, in its folder of the job
PARTS = 3  # of the steps; after each, the site measures what it has


def at_home(plan: TaskPlan) -> TaskPlan:
    """Make the plan by which a site trains on from the last global adapter, for itself.

    Nothing of it leaves, so it is neither noised nor encoded nor counted, and trains both factors. The terms of the
    loss that keep a site near the others are left out. To apply it twice changes nothing.

    Args:
        plan: of the rounds, as it applies to the site.
    """
    asked, training = plan.personalize, plan.training
    alone = {
        "local_steps": asked.steps,
        "learning_rate": min(10.0, asked.rate * training.learning_rate),
        "proximal_mu": 0.0,
        "restricted_softmax": 1.0,
        "logit_calibration": 0.0,
        "logit_adjustment": 0.0,
    }
    return plan.model_copy(
        update={
            "training": training.model_copy(update=alone),
            "evaluation": plan.evaluation.model_copy(update={"before": False, "after": False}),
            "personalize": asked.model_copy(update={"rate": 1.0}),
            "privacy": PrivacySettings(),
            "synthetic": SyntheticSettings(),
            "votes": 0,
            "sums": False,
            "uplink": (),
            "negotiable": tuple(dict.fromkeys((*plan.negotiable, "local_steps"))),
            "rest": "tail",
            "factors": "AB",
            "counts": (),
            "label_statistics": (),
        }
    )


def parts(steps: int) -> list[int]:
    """Cut steps into at most `PARTS` parts, as equal as they can be."""
    count = min(PARTS, steps)
    return [steps * (i + 1) // count - steps * i // count for i in range(count)]
