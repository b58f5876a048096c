"""Sample answers: what a base model says to a question, and what it says with the federation's adapter.

Both are greedy, by transformers' own `generate` behind the base model's own chat template. The base model is not
quantized here: this is how docs/how_to/serve_an_adapter.md loads a PEFT folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS = 64  # of an answer
_COLUMNS = ("system", "instruction", "input", "output")  # of a row in Alpaca's format


@dataclass(frozen=True)
class Sample:
    """One question and its answers.

    Args:
        site: from whose test rows it is.
        expected: the answer there.
        before, after: the model's, without and with the adapter.
    """

    site: str
    question: str
    expected: str
    before: str
    after: str


def sample(model: Path, adapter: Path, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Sample]:
    """Answer questions without an adapter and with it.

    Args:
        model: folder of the base model.
        adapter: PEFT folder.
        rows: site and row, with an `instruction` and an `output`.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..site.worker import quiet

    quiet()
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
    found = []
    for site, row in rows:
        prompt = _prompt(tokenizer, row)
        with tuned.disable_adapter():
            before = _answer(tuned, tokenizer, prompt)
        found.append(Sample(site, row["instruction"], row["output"], before, _answer(tuned, tokenizer, prompt)))
    return found


def _prompt(tokenizer: Any, row: Mapping[str, Any]) -> Any:
    """The tokens before the answer, as in training."""
    from ..site.tasks.conversations import alpaca_prompt, conversation

    asked = {name: row[name] for name in _COLUMNS if isinstance(row.get(name), str)}
    chat = conversation(asked)
    if chat is None or tokenizer.chat_template is None:
        return tokenizer(alpaca_prompt(asked), return_tensors="pt")
    before = chat.messages[: chat.learned[0]]
    return tokenizer.apply_chat_template(before, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _answer(model: Any, tokenizer: Any, prompt: Any) -> str:
    said = model.generate(**prompt, do_sample=False, max_new_tokens=TOKENS, pad_token_id=tokenizer.pad_token_id)[0]
    new = said[prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return f"{text} …" if len(new) == TOKENS else text
