"""A language model writes candidates from public words alone: labels, what they mean, and a few examples by hand.

A small model continues a list better than it follows an instruction. So the prompt is such a list: what the texts are,
the examples with their labels, and the label that a text is wanted for. Nothing private is read here.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import GenerationConfig

from ..config import LABELS, Labels, RoundPlan, Settings
from ..config import Text as Label
from ..errors import ConfigError
from ..site.model import base_model
from ..site.model.base_model import DTYPES, BaseModel, compute_dtype
from ..site.model.fingerprint import read_config
from ..site.offer.site_config import ModelSource
from ..site.offer.site_yaml import read_yaml
from ..site.tasks import registry as tasks
from .candidates import LONGEST, MOST_ROWS, Candidate, CandidateSet, Provenance, Text
from .keep import duplicates, personal_data, words

LEAST_WORDS = 3  # of a text that says anything
Tick = Callable[[int], None]  # is told how many texts more are there


class Example(Settings):
    """A public text, written by hand or taken from a public source, and what it is an example of."""

    label: Label
    text: Text


class Request(Settings):
    """All that the model is told, and nothing of it private: a file of the scientist's.

    Args:
        about: what the texts are, such as "Messages of customers to the help desk of a bank".
        labels: that texts are wanted for, as the training jobs have them.
        kind: what one text is called, such as "Message".
        by: what a label is called, such as "Topic".
        descriptions: label → what it means; of others their name says it.
        examples: texts with their labels, which may be others than `labels`.
    """

    about: Text
    labels: Annotated[Labels, Field(min_length=1)]
    kind: Label = "Text"
    by: Label = "Topic"
    descriptions: Annotated[Mapping[Label, Label], Field(max_length=LABELS)] = {}
    examples: Annotated[tuple[Example, ...], Field(max_length=100)] = ()

    @property
    def ends_at(self) -> str:
        """What ends a text: a line's end, or an empty line where examples have several lines."""
        return "\n\n" if any("\n" in example.text for example in self.examples) else "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of all that the model is told, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def prompt(self, label: str, examples: Sequence[Example] = ()) -> str:
        """Word the prompt for a text of `label`; `examples` come last, after the request's own."""
        listed = [f"{self.by}: {self.named(e.label)}\n{self.kind}: {e.text}\n\n" for e in (*self.examples, *examples)]
        return f"{self.about}\n\n{''.join(listed)}{self.by}: {self.named(label)}\n{self.kind}:"

    def named(self, label: str) -> str:
        """What the model is told of a label: what it means, or its name in words."""
        return self.descriptions.get(label) or label.replace("_", " ").strip()


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn.

    Args:
        per_label: texts wanted of each label.
        temperature: the lower, the more alike the texts are.
        top_p: share of the probability that the next token is drawn from.
        most_tokens: of a text; a longer one is cut there.
        batch_size: texts written together.
        rounds: batches for a label in multiples of those that would do if every text were of use.
    """

    per_label: int
    temperature: float = 1.0
    top_p: float = 0.9
    most_tokens: int = 48
    batch_size: int = 32
    seed: int = 0
    rounds: int = 3


def read_request(file: Path) -> Request:
    """Read a request, in YAML or JSON.

    Raises:
        ConfigError: `no_such_file`; `wrong_setting`; what `read_yaml` raises.
    """
    if not file.is_file():
        raise ConfigError(
            f"there is no file {file.name}; write one as docs/synthetic_data.md shows", code="no_such_file"
        )
    found = read_yaml(file, file.name)
    if not isinstance(found, Mapping):
        raise ConfigError(f"{file.name} holds no settings; it needs about and labels at least", code="wrong_setting")
    return Request.read(found, file.name)


def load(folder: Path) -> BaseModel:
    """Load a language model, in the type that this machine multiplies fastest.

    Raises:
        ModelError: it is missing, unsafe, or no language model.
    """
    width = read_config(folder).get_text_config().hidden_size
    natural = compute_dtype("auto", "nf4", width)
    named = next(name for name, dtype in DTYPES.items() if dtype == natural)
    plan = RoundPlan.read({"task": "causal_lm", "quantization": named, "compute_dtype": named}, "generator")
    return base_model.load(ModelSource(path=str(folder.absolute())), plan, tasks[plan.task])


def generate(
    generator: BaseModel,
    name: str,
    request: Request,
    sampling: Sampling,
    tick: Tick = lambda _: None,
) -> CandidateSet:
    """Have a model write texts for labels.

    A text is left out if it is too short, a duplicate, an example, or has what looks like personal data. Work on a
    label ends when there are enough, or after so many batches: a label may get fewer.

    Args:
        generator: as `load` returns it.
        name: of the model, for the provenance.
        tick: is told of texts as they come.
    Raises:
        ConfigError: `too_many_candidates`; `prompt_too_long`.
    """
    check_size(request, sampling)
    rows = []
    for label in request.labels:
        given = [example.text for example in request.examples]
        for text in enough(generator, [request.prompt(label)], request, label, sampling, given):
            rows.append(Candidate(text=text, label=label))
            tick(1)
    return CandidateSet(tuple(rows), provenance(generator, name, request, sampling))


def check_size(request: Request, sampling: Sampling) -> None:
    """Refuse to write more texts than a set may have.

    Raises:
        ConfigError: `too_many_candidates`.
    """
    if len(request.labels) * sampling.per_label > MOST_ROWS:
        raise ConfigError(
            f"{len(request.labels)} labels of {sampling.per_label} texts are more than the {MOST_ROWS} candidates of a "
            "set; ask for fewer of each label",
            code="too_many_candidates",
        )


def provenance(generator: BaseModel, name: str, request: Request, sampling: Sampling, parent: str = "") -> Provenance:
    """Where a set comes from that a model has written."""
    return Provenance(
        generator=name,
        fingerprint=generator.fingerprint,
        prompts=request.digest,
        seed=sampling.seed,
        parent=parent,
    )


def enough(
    generator: BaseModel,
    prompts: Sequence[str],
    request: Request,
    label: str,
    sampling: Sampling,
    known: Sequence[str],
) -> Iterator[str]:
    """Yield texts of use, until there are enough or the batches are used up.

    Args:
        prompts: what the model continues, taken in turn.
        known: texts that are not wanted again.
    """
    kept = list(known)
    most = sampling.rounds * math.ceil(sampling.per_label / sampling.batch_size)
    for number in range(most):
        left = sampling.per_label - (len(kept) - len(known))
        if left <= 0:
            return
        count = min(sampling.batch_size, max(8, left + left // 4))
        seed = f"{sampling.seed}/{label}/{number}"
        for text in sample(generator, prompts[number % len(prompts)], count, request, sampling, seed):
            if len(kept) - len(known) < sampling.per_label and of_use(text, kept):
                kept.append(text)
                yield text


def of_use(text: str, others: Sequence[str]) -> bool:
    """Whether a text says anything, is none of the others, and has nothing that looks like personal data."""
    return (
        len(words(text)) >= LEAST_WORDS
        and len(text) <= LONGEST
        and text.replace("\n", "").isprintable()
        and not personal_data([text])
        and not duplicates([*others, text]).keys() & {len(others)}
    )


@torch.inference_mode()
def sample(generator: BaseModel, prompt: str, count: int, request: Request, sampling: Sampling, seed: str) -> list[str]:
    """Draw `count` continuations of a prompt, each to its end as the request says.

    The prompt goes through the model once, and what it left there is repeated for each text.

    Args:
        seed: of the draw; the same one draws the same texts on the same machine.
    Raises:
        ConfigError: `prompt_too_long`.
    """
    model, tokenizer = generator.model, generator.tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    if ids.shape[1] + sampling.most_tokens > room:
        raise ConfigError(
            f"the prompt takes {ids.shape[1]} tokens, and with {sampling.most_tokens} of a text that is more than the "
            f"{room} that the model reads; give fewer or shorter examples",
            code="prompt_too_long",
        )
    settings = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_new_tokens=sampling.most_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        stop_strings=[request.ends_at],
    )
    given: dict[str, Any] = {}
    if ids.shape[1] > 1:
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        cache.batch_repeat_interleave(count)
        given = {"past_key_values": cache}
    many = ids.repeat(count, 1)
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
        drawn = model.generate(
            many, attention_mask=torch.ones_like(many), generation_config=settings, tokenizer=tokenizer, **given
        )
    return [
        _ended(text, request.ends_at)
        for text in tokenizer.batch_decode(drawn[:, ids.shape[1] :], skip_special_tokens=True)
    ]


def _ended(text: str, end: str) -> str:
    """A text up to its end, without blanks that do not matter."""
    lines = (" ".join(line.split()) for line in text.lstrip(" ").split(end)[0].splitlines())
    return "\n".join(filter(None, lines))
