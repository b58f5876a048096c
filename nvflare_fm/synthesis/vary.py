"""Variations of chosen candidates by the model that wrote them, for another vote: Aug-PE, arXiv:2403.01749.

The chosen are public by then: their votes were noised. So they may be shown to the model as examples, and a small model
writes more that are like them. The new set holds the chosen, too, for the next vote compares both.
"""

from random import Random

from ..site.model.base_model import BaseModel
from .candidates import Candidate, CandidateSet
from .generate import Example, Request, Sampling, Tick, enough, provenance

SHOWN = 3  # of the chosen of a label, at a time


def vary(
    generator: BaseModel,
    name: str,
    request: Request,
    chosen: CandidateSet,
    sampling: Sampling,
    tick: Tick = lambda _: None,
) -> CandidateSet:
    """Have a model write variations of a chosen set.

    Args:
        generator: as `generate.load` returns it.
        name: of the model, for the provenance.
        request: what the model was told of the texts; its own examples come first.
        chosen: rows with labels; of a label without any nothing is written.
        sampling: `per_label` is how many variations of each label are wanted.
        tick: is told of texts as they come.
    Returns:
        The chosen, without their votes, and their variations.
    Raises:
        ConfigError: `too_many_candidates`; `prompt_too_long`.
    """
    of_label: dict[str, list[str]] = {}
    for row in chosen.rows:
        if row.label is not None and row.prompt is None:
            of_label.setdefault(row.label, []).append(row.text)
    rows = [row.model_copy(update={"votes": None}) for row in chosen.rows]
    given = [example.text for example in request.examples]
    for label, texts in of_label.items():
        prompts = [request.prompt(label, shown) for shown in _shown(label, texts, sampling)]
        for text in enough(generator, prompts, request, label, sampling, [*given, *texts]):
            rows.append(Candidate(text=text, label=label))
            tick(1)
    return CandidateSet(tuple(rows), provenance(generator, name, request, sampling, chosen.digest))


def _shown(label: str, texts: list[str], sampling: Sampling) -> list[list[Example]]:
    """The examples of each prompt: every text is in one, beside others of its label."""
    mixed = Random(f"{sampling.seed}/{label}").sample(texts, len(texts))
    parts = [mixed[start : start + SHOWN] for start in range(0, len(mixed), SHOWN)]
    return [[Example(label=label, text=text) for text in part] for part in parts]
