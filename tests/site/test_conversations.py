"""Conversations of every shape become the same texts, and each answer stands behind what inference puts there."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import DataError
from nvflare_fm.site.data import loading as data
from nvflare_fm.site.offer.site_config import DataSource
from nvflare_fm.site.tasks import IGNORED, BadRow, Cut, Encoded, registry
from nvflare_fm.site.tasks.conversations import conversation
from tests.codes import refused
from tests.site import chats, tiny, words

TOKENIZERS = {name: chats.tokenizer(*how) for name, how in chats.BY_EOS.items()}
CHATML = TOKENIZERS["ChatML"]
KINDS = words.kinds()
SAID = st.text("abé🙂 \n", min_size=1, max_size=8).filter(str.strip)


def encode(row: dict[str, Any], tokenizer: Any = CHATML, max_length: int = 4096) -> Encoded:
    return registry["causal_lm"].encode(row, tokenizer, tiny.plan(max_length=max_length))


def turns(*said: str, system: str = "") -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


def learned(found: Encoded) -> list[tuple[list[int], list[int]]]:
    """Each run of tokens that are learned, and all tokens before it."""
    runs = []
    for example in found.examples:
        ids, labels = example["input_ids"], example["labels"]
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        for i, label in enumerate(labels):
            if label != IGNORED and (i == 0 or labels[i - 1] == IGNORED):
                end = next((j for j in range(i, len(ids)) if labels[j] == IGNORED), len(ids))
                runs.append((ids[i:end], ids[:i]))
    return runs


def texts(found: Encoded, tokenizer: Any = CHATML) -> list[str]:
    return [tokenizer.decode(answer) for answer, _ in learned(found)]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(said=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3), thinks=st.booleans(), data=st.data())
def test_an_answer_is_all_that_is_learned_and_stands_behind_the_tokens_of_its_prompt(
    name: str, said: list[tuple[str, str]], thinks: bool, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    system = data.draw(st.sampled_from(["", "be kind"])) if name not in ("Gemma", "Mistral") else ""
    messages = turns(*(text for pair in said for text in pair), system=system)
    if thinks and name.startswith("Qwen"):
        messages = [m | {"content": f"<think>\nso\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
                    for m in messages]  # fmt: skip
    runs = learned(encode({"messages": messages}, tokenizer))
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(runs) == len(places)
    for i, (answer, before) in zip(places, runs, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        assert before == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ends = {whole[len(prompt) :], whole[len(prompt) :] + tokenizer.eos_token}
        assert tokenizer.decode(answer) in ends


@pytest.mark.parametrize("kind", KINDS)
@given(said=st.lists(SAID, min_size=2, max_size=4), rewrites=st.booleans())
def test_answers_stand_behind_the_tokens_of_their_prompts_in_every_kind_of_tokenizer(
    kind: str, said: list[str], rewrites: bool
) -> None:
    tokenizer, messages = KINDS[kind], turns(*said)
    tokenizer.chat_template = "{{ (messages | length + 1) // 2 }}" * rewrites + tiny.CHAT
    runs = learned(encode({"messages": messages}, tokenizer))
    for i, (_, before) in zip(range(1, len(said), 2), runs, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        assert before == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_where_earlier_turns_stay_as_they_were_a_conversation_is_one_example() -> None:
    row = {"messages": turns("hi", "a", "why", "b", "so", "c")}
    counts = {name: len(encode(row, tokenizer).examples) for name, tokenizer in TOKENIZERS.items()}
    assert [counts[name] for name in ("ChatML", "Hermes", "Gemma", "Mistral")] == [1, 1, 1, 1]
    assert [counts[name] for name in ("Qwen 3", "Qwen 3, thinking", "Phi 3")] == [3, 3, 3]
    assert counts["Llama 3"] == 3  # this tokenizer, unlike Llama 3's, cuts two line ends otherwise where a text follows


def test_the_end_of_a_prompt_is_no_part_of_the_answers_first_token() -> None:
    row = {"messages": turns("hi", "\n\nill")}
    (prompt, joined), end = (CHATML(text, add_special_tokens=False)["input_ids"] for text in ("\n", "\n\n")), 1
    assert len(joined) == end
    (example,) = encode(row).examples
    text = CHATML.apply_chat_template(row["messages"], tokenize=False)
    assert example["input_ids"] != CHATML(text, add_special_tokens=False)["input_ids"]
    ((answer, before),) = learned(encode(row))
    assert before[-1:] == prompt
    assert CHATML.decode(answer) == "\n\nill<|im_end|>\n"


def test_a_template_that_ends_the_last_answer_alone_has_a_text_for_each() -> None:
    tokenizer = chats.tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = encode({"messages": turns("hi", "a", "why", "b")}, tokenizer)
    assert texts(found, tokenizer) == ["a<|im_end|>\n", "b<|im_end|>\n"]


SAME: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": turns("hi", "yes", "why", "so", system="be kind")},
    "OpenAI, parts": {
        "messages": [m | {"content": [{"type": "text", "text": m["content"], "image_url": None}]}
                     for m in turns("hi", "yes", "why", "so", system="be kind")],
    },
    "OpenAI, a table's empty values": {
        "messages": [m | {"tool_calls": None, "name": None, "weight": None}
                     for m in turns("hi", "yes", "why", "so", system="be kind")],
        "tools": None,
    },
    "Anthropic's system": {"system": "be kind", "messages": turns("hi", "yes", "why", "so")},
    "both kinds of names in a table": {"conversations": [
        m | {"from": None, "value": None} for m in turns("hi", "yes", "why", "so", system="be kind")
    ]},
    "ShareGPT": {"conversations": [
        {"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "why"}, {"from": "gpt", "value": "so"},
    ]},
    "ShareGPT, system beside": {"system": "be kind", "conversations": [
        {"from": "user", "value": "hi"}, {"from": "assistant", "value": "yes"},
        {"from": "human", "value": "why"}, {"from": "gpt", "value": "so"},
    ]},
    "Alpaca with a history": {
        "instruction": "why", "input": "", "output": "so", "history": [["hi", "yes"]], "system": "be kind",
    },
    "several shapes": {"messages": turns("hi", "yes", "why", "so", system="be kind"), "prompt": "hi", "text": "no"},
}  # fmt: skip


@pytest.mark.parametrize("shape", SAME)
def test_every_shape_of_a_conversation_gives_the_same(shape: str) -> None:
    assert encode(SAME[shape]) == encode(SAME["OpenAI"])
    assert texts(encode(SAME[shape])) == ["yes<|im_end|>\n", "so<|im_end|>\n"]


def test_alpacas_input_is_never_lost() -> None:
    row = {"instruction": "name it", "input": "a red fruit", "output": "apple", "text": "no"}
    (told,) = encode(row).examples
    assert "name it\n\na red fruit" in CHATML.decode(told["input_ids"])
    assert texts(encode(row)) == ["apple<|im_end|>\n"]
    plain = chats.tokenizer(None)
    (told,) = encode(row, plain).examples
    text = plain.decode(told["input_ids"])
    assert "### Instruction:\nname it\n\n### Input:\na red fruit\n\n### Response:\napple" in text
    assert texts(encode(row, plain), plain) == ["apple<|im_end|>"]
    assert "Input" not in plain.decode(encode(row | {"input": " "}, plain).examples[0]["input_ids"])
    for lost in ({"system": "be kind"}, {"history": [["a", "b"]]}, {"tools": TOOLS}):
        with refused("no_chat_template", BadRow):
            encode(row | lost, plain)


def test_of_trls_prompt_and_completion_the_completion_is_learned() -> None:
    said = turns("hi", "yes", "why", "so", "and", "no")
    found = encode({"prompt": said[:3], "completion": said[3:]})
    assert texts(found) == ["so<|im_end|>\n", "no<|im_end|>\n"]
    assert found.examples[0]["input_ids"] == encode({"messages": said}).examples[0]["input_ids"]


def test_an_answer_of_weight_0_is_not_learned() -> None:
    said = turns("hi", "yes", "why", "so")
    assert texts(encode({"messages": [said[0], said[1] | {"weight": 0}, *said[2:]]})) == ["so<|im_end|>\n"]
    with refused("no_assistant_turn", BadRow):
        encode({"messages": [said[0], said[1] | {"weight": 0}]})


CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "lungs"}'}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": None, "parameters": {"type": "object"}}}]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "how is he"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "clear"},
    {"role": "assistant", "content": "well"},
]


def test_a_tool_call_is_learned_with_its_arguments_as_values() -> None:
    hermes = TOKENIZERS["Hermes"]
    call = '\n<tool_call>\n{"name": "look", "arguments": {"at": "lungs"}}\n</tool_call><|im_end|>\n'
    found = encode({"messages": CALLED, "tools": TOOLS}, hermes)
    assert texts(found, hermes) == [call, "well<|im_end|>\n"]
    text = hermes.decode(found.examples[0]["input_ids"])
    assert '{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}' in text
    assert "<tool_response>clear</tool_response>" in text
    assert encode({"messages": CALLED, "tools": json.dumps(TOOLS)}, hermes) == found
    spread = {"type": "function", "function": {"name": "look", "arguments": {"at": "lungs", "of": None}}}
    by_value = [CALLED[0], CALLED[1] | {"tool_calls": [spread]}, *CALLED[2:]]
    assert encode({"messages": by_value, "tools": TOOLS}, hermes) == found
    function = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    assert encode({"messages": [CALLED[0], function, *CALLED[2:]], "tools": TOOLS}, hermes).examples == found.examples
    glaive = {
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "how is he"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "lungs"}}'},
            {"from": "observation", "value": "clear"},
            {"from": "gpt", "value": "well"},
        ],
    }
    assert encode(glaive, hermes) == found


FIRST_CALL = chats.HERMES.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
CALL_ALONE = chats.HERMES.replace("{{ m.content }}{% endif %}", "{{ m.content if not m.tool_calls }}{% endif %}")
NO_TOOLS_SAY = chats.HERMES.replace("<tool_response>{{ m.content }}</tool_response>", "")


@pytest.mark.parametrize(
    ("template", "messages", "left_out"),
    [
        (chats.CHATML, CALLED, "a tool call"),
        (FIRST_CALL, [CALLED[0], CALLED[1] | {"tool_calls": [CALL, CALL]}], "a tool call"),
        (CALL_ALONE, [CALLED[0], CALLED[1] | {"content": "I look"}], "a part of the text"),
        (CALL_ALONE, [*turns("I look"), CALLED[1] | {"content": "I look"}], "a part of the text"),
        (chats.R1, turns("hi", "<think>a</think>b"), "a part of the text"),
        (chats.R1, turns("hi", f"<think>{'a' * 99}</think>b"), "a part of the text"),
        (chats.CHATML, [CALLED[0], CALLED[3] | {"reasoning_content": "so"}], "the reasoning"),
        (chats.CHATML, [CALLED[0], CALLED[3] | {"reasoning": "so"}], "the reasoning"),
        (chats.CHATML, [CALLED[0], CALLED[3] | {"function_call": CALL["function"]}], "a tool call"),
        (NO_TOOLS_SAY, CALLED, "another than user"),
    ],
)
def test_what_a_template_leaves_out_is_not_lost_in_silence(
    template: str, messages: list[dict[str, Any]], left_out: str
) -> None:
    with refused("template_leaves_out", BadRow, left_out):
        encode({"messages": messages}, chats.tokenizer(template))


SECRET = "Quarantine-9"
ROW_OF = {
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}]},
    "a part without text": {"messages": [{"role": "assistant", "content": [{"type": "text", "text": None}]}]},
    "no content": {"messages": [{"role": "assistant", "content": None}]},
    "parts that are texts": {"messages": [{"role": "assistant", "content": [SECRET]}]},
    "a user's tool call": {"messages": [{"role": "user", "content": SECRET, "tool_calls": [CALL]}]},
    "arguments that are no JSON": {"messages": [CALLED[1] | {"tool_calls": [
        {"function": {"name": "look", "arguments": SECRET}}]}]},
    "arguments that are a list": {"messages": [CALLED[1] | {"tool_calls": [
        {"function": {"name": "look", "arguments": "[1]"}}]}]},
    "a call without a name": {"messages": [CALLED[1] | {"tool_calls": [{"function": {"arguments": SECRET}}]}]},
    "51 calls": {"messages": [CALLED[1] | {"tool_calls": [CALL] * 51}]},
    "tools that are a text": {"messages": turns("a", "b"), "tools": SECRET},
    "a reasoning that is no text": {"messages": [{"role": "assistant", "content": SECRET, "thinking": 3}]},
    "a name nobody knows": {"conversations": [{"from": SECRET, "value": "a"}, {"from": "gpt", "value": "b"}]},
    "no name": {"conversations": [{"value": SECRET}]},
    "no conversation": {"conversations": SECRET},
    "two systems": {"system": "be kind", "conversations": [{"from": "system", "value": SECRET}]},
    "a prompt in another shape": {"prompt": turns(SECRET), "completion": "b"},
    "a completion in another shape": {"prompt": SECRET, "completion": turns("b")},
    "no prompt": {"completion": turns(SECRET, "b")},
    "no instruction": {"output": SECRET},
    "no output": {"instruction": SECRET, "input": "b"},
    "an input that is a number": {"instruction": SECRET, "input": 3, "output": "b"},
    "a history that is none": {"instruction": SECRET, "output": "b", "history": [["a"]]},
    "too long a history": {"instruction": SECRET, "output": "b", "history": [["a", "b"]] * 100},
    "nobody answers": {"messages": [{"role": "user", "content": SECRET}]},
}  # fmt: skip


@pytest.mark.parametrize("what", ROW_OF)
def test_a_conversation_that_cannot_be_used_is_a_bad_row_and_not_repeated(what: str) -> None:
    with pytest.raises(BadRow) as caught:
        encode(ROW_OF[what], TOKENIZERS["Hermes"])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["Gemma", "Mistral"])
def test_a_template_that_refuses_a_conversation_says_so_without_repeating_it(name: str) -> None:
    for messages in (turns("hi", "b", system=SECRET), [*turns("hi", "b"), *turns("hi", SECRET)[1:]]):
        with refused("template_refuses", BadRow) as caught:
            encode({"messages": messages}, TOKENIZERS[name])
        assert SECRET not in str(caught.value)


def test_a_system_message_that_a_template_moves_is_told_of() -> None:
    mistral = chats.tokenizer(chats.MISTRAL_3, "</s>")
    assert texts(encode({"messages": turns("hi", "a", "why", "b")}, mistral), mistral) == [" a</s>", " b</s>"]
    with refused("template_rewrites", BadRow):
        encode({"messages": turns("hi", "a", system=SECRET)}, mistral)


def test_answers_behind_max_length_are_counted() -> None:
    said = {"messages": turns("hi", "a" * 9, "why", "b" * 9)}
    for name in ("ChatML", "Qwen 3"):
        whole = encode(said, TOKENIZERS[name])
        assert whole.cut == Cut()
        longest = max(len(example["input_ids"]) for example in whole.examples)
        short = encode(said, TOKENIZERS[name], max_length=longest - 4)
        assert (short.cut.rows, short.cut.tokens, short.cut.answers) == (1, 4, 1)
        first = encode(said, TOKENIZERS[name], max_length=len(learned(whole)[1][1]))
        assert (len(first.examples), first.cut.answers) == (1, 1)
    plain = {"prompt": "how is he", "completion": " ill"}
    count = len(encode(plain).examples[0]["input_ids"])
    assert encode(plain, max_length=count - 1).cut == Cut(rows=1, tokens=1, answers=1)  # its end is not learned


def test_prompts_that_would_take_too_long_to_tokenize_are_a_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvflare_fm.site.tasks.causal_lm._PROMPTS", 200)
    for name in ("ChatML", "Qwen 3"):
        assert encode({"messages": turns("hi", "a", "why", "b")}, TOKENIZERS[name]).cut == Cut()
        with refused("prompts_too_long", BadRow, "200"):
            encode({"messages": turns("hi", "a" * 99, "why", "b")}, TOKENIZERS[name])
    assert encode({"messages": turns("hi", "a" * 99, "why", "b")}, CHATML, 30).cut.answers == 2


@given(length=st.integers(8, 60), name=st.sampled_from(sorted(TOKENIZERS)))
def test_at_every_length_an_answer_is_learned_whole_or_counted(length: int, name: str) -> None:
    said, tokenizer = {"messages": turns("hi", "one two", "why", "three", "so", "four")}, TOKENIZERS[name]
    whole = [tokenizer.decode(answer) for answer, _ in learned(encode(said, tokenizer))]
    try:
        found = encode(said, tokenizer, max_length=length)
    except BadRow:
        return
    kept = [tokenizer.decode(answer) for answer, _ in learned(found)]
    assert sum(text in whole for text in kept) == 3 - found.cut.answers
    assert (found.cut == Cut()) == (kept == whole)


LONG = [{"messages": turns(*(f"{'ab'[i % 2]}{row}" for i in range(2 * (row % 3 + 1))))} for row in range(20)]


def load(file: Path, tokenizer: Any, **more: Any) -> data.SiteData:
    source = DataSource.model_validate({"train": str(file), **more})
    return data.load(source, tiny.plan(max_length=512), registry["causal_lm"], tokenizer)


def test_a_conversation_is_trained_on_or_held_out_as_a_whole(tmp_path: Path) -> None:
    found = load(tiny.jsonl(tmp_path / "a.jsonl", LONG), TOKENIZERS["Qwen 3"])
    assert len(found.train) + len(found.validation) == sum(row % 3 + 1 for row in range(20))
    assert [len(set(numbers)) for numbers in (found.train_rows, found.validation_rows)] == [18, 2]
    text = [{TOKENIZERS["Qwen 3"].decode(ids).split("a", 2)[2].split("<")[0] for ids in split["input_ids"][:]}
            for split in (found.train, found.validation)]  # fmt: skip
    assert not text[0] & text[1]


def test_answers_of_one_conversation_count_as_one_row_wherever_rows_are_counted(tmp_path: Path) -> None:
    """A floor on the rows behind an answer would else be met by one patient's long conversation."""
    file = str(tiny.jsonl(tmp_path / "a.jsonl", LONG))
    found = load(tmp_path / "a.jsonl", TOKENIZERS["Qwen 3"], validation=file)
    for contents, numbers in zip(found.contents, (found.train_rows, found.validation_rows), strict=True):
        assert len(set(contents)) == len(set(numbers)) == 20
        assert len({*zip(contents, numbers, strict=True)}) == 20
    assert found.measured(0, 5) == len(found.validation)
    for asked in range(1, 25):
        count = found.measured(asked, 5)
        behind = set(found.validation_rows[:count])
        assert len(behind) == data.measured(20, asked, 5)
        assert not behind & set(found.validation_rows[count:])


def test_a_site_without_a_chat_template_says_so_by_code(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tiny.jsonl(tmp_path / "a.jsonl", LONG), chats.tokenizer(None))
    assert caught.value.code == "no_chat_template"


def test_a_plain_row_is_no_conversation() -> None:
    assert conversation({"prompt": "a", "completion": "b"}) is None
    assert conversation({"text": "a", "messages": None}) is None
