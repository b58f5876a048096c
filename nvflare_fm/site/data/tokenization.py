"""What a tokenizer makes of texts and conversations, as two short digests: sites whose digests differ do not train the
same thing, however equal their weights are.

The probe texts are fixed: with others, no site's digest would equal that of one that has not been updated.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

PROBES = (
    "The patient, aged 74, was given 2.5 mg of aspirin at 08:30.",
    "  two blanks, then\ttabs\t\tand lines\r\n\n\n    of code: x_1 += f(y)[0];  ",
    "UPPER, lower and MiXeD; it's, don't, I'LL, naïve café, cafe\u0301, Größe, ĲSSEL, ﬁne, №",
    "1234567890 3.14159 1,000,000 ½ ² Ⅳ １２",
    "患者は七十四歳です。 患者今年七十四岁。 환자는 일흔네 살이다.",
    "Пациенту 74 года. مريض في الرابعة والسبعين. रोगी चौहत्तर वर्ष का है। ผู้ป่วยอายุเจ็ดสิบสี่ปี",
    "🙂👩🏽‍⚕️🇩🇪 → ∑ € … “quotes” – dash — \u00a0\u200b\ufeff",
    "<s></s><unk><pad><mask>[CLS][SEP][PAD]<|endoftext|><|im_start|><|im_end|><|eot_id|><bos><eos>[INST]",
)
_SAID = ("Is it safe?", "Yes, it is.", "  Why?\n", "It was tried.")
_TURNS = [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(_SAID)]
_CONVERSATIONS = (_TURNS, _TURNS[:3], [{"role": "system", "content": "Be brief."}, *_TURNS[:2]])
_NO_DATE = "{% macro strftime_now(format) %}{{ format }}{% endmacro %}"  # today's makes no difference between sites


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest a tokenizer's vocabulary, how it cuts the probes, and its end token."""
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in PROBES]
    return _digest([ids, sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest a few conversations in a tokenizer's chat template; one that it refuses counts too."""
    return _digest(list(_rendered(tokenizer)))


def _rendered(tokenizer: PreTrainedTokenizerBase) -> Iterator[str | None]:
    """Conversations as the template words them; None where it refuses or there is none."""
    for turns in _CONVERSATIONS:
        asks = turns[-1]["role"] == "user"
        try:
            dateless = _NO_DATE + tokenizer.get_chat_template()
            yield tokenizer.apply_chat_template(
                turns, chat_template=dateless, tokenize=False, add_generation_prompt=asks
            )
        except Exception:  # a template raises what it likes
            yield None


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]
