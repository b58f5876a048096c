"""Chat templates in short, as known models have them, and a tokenizer that knows their tokens."""

from transformers import PreTrainedTokenizerFast

from tests.site import words

_MARKS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "[INST]", "[/INST]", "<think>", "</think>",
]  # fmt: skip

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception(m.content) }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_3 = MISTRAL.replace(  # a system message stands before the last question, and nowhere once that is answered
    "{% for m in messages %}", "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}"
).replace("[INST] ", "[INST] {{ system if loop.last }}")  # fmt: skip
PHI_3 = (  # what is no prompt ends
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<end>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN_3 = (  # what was thought in earlier turns is left out, and a last answer without a thought gets an empty one
    "{% set ns = namespace(asked=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set thought = '' %}{% set said = m.content %}"
    "{% if m.reasoning_content %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.asked %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = QWEN_3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # its prompt begins the thought
HERMES = (  # as Qwen 2.5's
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}"
    '{{ "\n" }}<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (  # a last answer loses its thought as well
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BY_EOS = {  # template, the end token of the model it belongs to
    "ChatML": (CHATML, "<|im_end|>"),
    "Llama 3": (LLAMA_3, "<|eot_id|>"),
    "Gemma": (GEMMA, "</s>"),
    "Mistral": (MISTRAL, "</s>"),
    "Phi 3": (PHI_3, "</s>"),
    "Qwen 3": (QWEN_3, "<|im_end|>"),
    "Qwen 3, thinking": (THINKING, "<|im_end|>"),
    "Hermes": (HERMES, "<|im_end|>"),
}


def tokenizer(template: str | None = CHATML, end: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Byte-level, with tokens of several blanks and line ends, so that a prompt's end may join what comes after it."""
    fast = words.fast(words.byte_level(size=400, more=["a\n\nb\n\n\nc  d   e\n ill"] * 20))
    fast.add_special_tokens({"additional_special_tokens": _MARKS})
    fast.eos_token = end
    fast.chat_template = template
    return fast
