"""The model card of an exported adapter: what it is, what made it, which class loads it; as Hugging Face's are.

No site is named in it. What is not known is left out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from ..config import SyntheticSettings
from ..job.tasks import promises
from ..record.round import Round
from ..untrusted import one_line
from .folder import Saved

FILE_NAME = "README.md"


@dataclass(frozen=True)
class Made:
    """What the rounds tell of an adapter; each part is empty where it is not known."""

    rounds: int | None = None
    sites: int | None = None  # that had a part in it
    ended: str = ""
    aggregation: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)  # the sites' own measurements of it


def made(rounds: Sequence[Round], by: int | None) -> Made:
    """Gather what is known of an adapter.

    Args:
        rounds: those of the job that made it, as far as they are at hand.
        by: the round that made it; None: unknown.
    """
    if by is None:
        return Made()
    number = by + 1
    its = [line for line in rounds if line.round < number and line.trained]
    last = next((line for line in its if line.round == by), None)
    if last is None:
        return Made(number)
    measured = next((line.measured for line in rounds if line.round == number), {})
    sites = {site for line in its for site in line.sites}
    return Made(number, len(sites), last.ended, last.how, measured)


@dataclass(frozen=True)
class Card:
    """All that a card says.

    Args:
        base: what the user calls the base model; empty: not named.
        base_checked: its weights are those that the adapter was trained on.
        merged: the folder holds a whole model, not an adapter.
        one_rank: every layer of the adapter has the same rank and scale.
        versions: package → version.
    """

    name: str
    saved: Saved
    made: Made
    base: str
    base_checked: bool
    merged: bool
    one_rank: bool
    versions: Mapping[str, str]
    exported: date

    @property
    def model_class(self) -> str:
        """The class that loads the base model, with the task's head."""
        return self.saved.manifest.base_class.rpartition(".")[2] or promises(self.saved.manifest.task).auto_class

    @property
    def library(self) -> str:
        return self.saved.manifest.base_class.rpartition(".")[0] or "transformers"


def render(card: Card) -> str:
    """The card as Markdown, with the metadata at its head that the Hugging Face hub reads."""
    parts = [_head(card), f"# {_text(card.name)}\n", _what(card), _table(card), _use(card), _limits(card)]
    return "\n".join(parts)


def _head(card: Card) -> str:
    values: dict[str, Any] = {
        **({"base_model": card.base} if card.base else {}),
        "library_name": "transformers" if card.merged else "peft",
        "pipeline_tag": promises(card.saved.manifest.task).pipeline,
        "tags": ["federated-learning", "nvflare", card.saved.manifest.peft],
    }
    return "".join(["---\n", *(f"{name}: {json.dumps(value)}\n" for name, value in values.items()), "---\n"])


def _what(card: Card) -> str:
    kind = "A model: its base with the adapter merged into it, in 16 bits" if card.merged else "An adapter"
    labels = ", ".join(f"{i} = {_text(label)}" for i, label in enumerate(card.saved.manifest.labels))
    said = f"{kind}. Several sites trained it together; their data stayed with them."
    return f"{said}\n\nTask: `{_text(card.saved.manifest.task)}`." + (f" Labels: {labels}.\n" if labels else "\n")


def _table(card: Card) -> str:
    plan, found, aggregation = card.saved.plan, card.made, card.made.aggregation
    checked = "its weights were compared with the fingerprint" if card.base_checked else "its weights were not compared"
    rows = [
        ("base model", f"{card.base or 'not named'}; {checked}"),
        ("fingerprint of the base model", card.saved.manifest.base),
        ("method", f"{card.saved.manifest.peft}{_peft(plan.peft) if plan else ''}"),
        ("rounds", found.rounds),
        ("sites that took part", found.sites),
        ("merge rule", aggregation.get("merge")),
        ("weights", json.dumps(aggregation["weigh"]) if aggregation.get("weigh") else None),
        ("quantization of the base model in training", plan.quantization if plan else None),
        ("texts in training were cut after (tokens)", plan.max_length if plan else None),
        ("synthetic rows beside the sites' own", _synthetic(plan.synthetic) if plan else None),
        ("multiply each answer by", _numbers(plan.target_scale) if plan else None),
        ("then add", _numbers(plan.target_mean) if plan else None),
        ("ended", found.ended),
        *((f"{_text(name)}, as the sites measured it", f"{v:.4g}") for name, v in sorted(found.metrics.items())),
        ("exported", card.exported.isoformat()),
        ("versions", ", ".join(f"{name} {version}" for name, version in card.versions.items())),
    ]
    known = [f"| {name} | {_text(str(value))} |" for name, value in rows if value not in (None, "")]
    return "\n".join(["## Where it comes from\n", "| what | |", "|---|---|", *known, ""])


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _peft(settings: Mapping[str, Any]) -> str:
    shown = {name: settings[name] for name in ("rank", "lora_alpha", "use_rslora", "use_dora") if settings.get(name)}
    return "".join(f", {name} {value}" for name, value in shown.items())


def _synthetic(asked: SyntheticSettings) -> str | None:
    """How many there may have been, and which; what each site accepted stays there."""
    return f"up to {asked.share:.0%} of a site's, of the set {asked.digest}" if asked.asked else None


def _use(card: Card) -> str:
    return f"## How to load it\n\n```python\n{_code(card)}```\n{_warning(card)}"


def _code(card: Card) -> str:
    name = card.model_class
    if card.merged:
        begin = [f"from {card.library} import {name}", "from transformers import AutoTokenizer", ""]
        model = [f'model = {name}.from_pretrained(".").eval()', 'tokenizer = AutoTokenizer.from_pretrained(".")', ""]
        return "\n".join([*begin, *model])
    lines = ["from peft import PeftModel", f"from {card.library} import {name}", ""]
    labels = [one_line(label) for label in card.saved.manifest.labels]
    if labels:
        lines.append(f"labels = {json.dumps(labels, ensure_ascii=False)}")
    counted = ", num_labels=len(labels), id2label=dict(enumerate(labels))" if labels else ""
    lines.append(f"base = {name}.from_pretrained({json.dumps(card.base or 'the base model')}{counted})")
    lines.append('model = PeftModel.from_pretrained(base, ".").eval()')
    if card.saved.manifest.peft == "lora":
        lines.append('assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n), "another class?"')
    return "\n".join([*lines, ""])


def _warning(card: Card) -> str:
    said = []
    if not card.merged:
        said.append(
            f"\n**Load the base model with `{card.model_class}`.** A LoRA adapter here names its layers\n"
            "in full, so that PEFT stops on a class that names them otherwise. In other cases PEFT only warns of\n"
            "missing keys: the LoRA stays zero, or the head as it was made, and the model answers as its base does.\n"
        )
    if card.library != "transformers":
        said.append(
            "\nThis classifier reads the mean of a text's tokens, as its base model was trained to.\n"
            f"`{card.model_class}` of the package `nvflare_fm` does that.\n"
            "transformers' own classes read the first token instead: with them the answers are wrong, without an\n"
            "error. Servers such as vLLM and Ollama cannot serve it.\n"
        )
    return "".join(said)


def _limits(card: Card) -> str:
    lines = ["The base model's licence and its limits hold for this model, too."]
    if not card.made.metrics:
        lines.append("No measurement of it is known here.")
    else:
        lines.append("The sites measured it on rows of their own; elsewhere it may do worse.")
    if not (card.merged or card.one_rank):
        lines.append(
            "Rank or scale differ between its layers. Servers that read one rank only, such as vLLM, need the merged\n"
            "  model: `nvflare-fm export … --merge`."
        )
    lines.append("It was trained without differential privacy: parts of training texts may be learned by heart.")
    return "\n".join(["## Limits\n", *(f"- {line}" for line in lines), ""])


def _text(text: str) -> str:
    """A text from elsewhere inside a line or a cell of Markdown, without markup of its own."""
    return one_line(text).replace("\\", "\\\\").replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
