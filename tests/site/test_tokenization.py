"""Sites whose tokenizers or chat templates do something else do not merge; what makes no difference is not seen."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import Aggregation
from nvflare_fm.errors import ModelError
from nvflare_fm.simulate import federate
from nvflare_fm.site.data.tokenization import PROBES, chat_template_digest, tokenizer_digest
from tests.site import tiny, words

Edit = Callable[[PreTrainedTokenizerFast], None]


def edited(edit: Edit) -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    edit(tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.add_tokens(["aspirin"]),
        lambda t: setattr(t, "eos_token", "<end>"),
        lambda t: setattr(t, "add_bos_token", True) or t.update_post_processor(),
        lambda t: setattr(t.backend_tokenizer, "normalizer", words.normalizers.NFKC()),
        lambda t: setattr(t.backend_tokenizer, "normalizer", words.normalizers.Lowercase()),
        lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", words.pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ],
    ids=["an added token", "another end", "a token before", "normal forms", "no capitals", "a blank before"],
)
def test_a_tokenizer_that_does_something_else_has_another_digest(edit: Edit) -> None:
    assert tokenizer_digest(edited(edit)) != tokenizer_digest(tiny.tokenizer())


def test_two_tokens_that_swap_their_ids_are_another_tokenizer_though_no_probe_has_them() -> None:
    one, other = (edited(lambda t, names=names: t.add_tokens(names)) for names in (["qqx", "xqq"], ["xqq", "qqx"]))
    assert not any("qqx" in text or "xqq" in text for text in PROBES)
    assert tokenizer_digest(one) != tokenizer_digest(other)


def test_digests_are_equal_exactly_where_ids_are() -> None:
    for (_, one), (_, other) in combinations(words.kinds().items(), 2):
        same = [one(text)["input_ids"] == other(text)["input_ids"] for text in PROBES]
        assert (tokenizer_digest(one) == tokenizer_digest(other)) == all(same)


def test_how_a_tokenizer_is_stored_and_padded_makes_no_difference(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    stored = AutoTokenizer.from_pretrained(tmp_path)
    stored.padding_side, stored.pad_token = "left", "</s>"
    assert tokenizer_digest(stored) == tokenizer_digest(tokenizer)
    assert chat_template_digest(stored) == chat_template_digest(tokenizer)


WORDED_OTHERWISE = [
    None,
    "{{ bos_token }}" + tiny.CHAT,
    tiny.CHAT.replace("m.content", "m.content | trim"),
    tiny.CHAT.replace("<|assistant|>", "<|assistant|> "),
    "{{ raise_exception('no') }}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + tiny.CHAT,
]


def worded(template: str | None) -> str:
    return chat_template_digest(edited(lambda t: setattr(t, "chat_template", template)))


@pytest.mark.parametrize("template", WORDED_OTHERWISE)
def test_another_wording_is_another_template(template: str | None) -> None:
    assert worded(template) != worded(tiny.CHAT)


def test_the_same_wording_is_the_same_template_however_it_is_written() -> None:
    assert worded(tiny.CHAT + "{# of 2024 #}\n") == worded(tiny.CHAT)
    assert worded(tiny.CHAT.replace("m.content", "m['content']")) == worded(tiny.CHAT)


def test_a_template_that_tells_the_date_is_the_same_every_day() -> None:
    first, again, other = (worded("{{ strftime_now('" + form + "') }}" + tiny.CHAT) for form in ("%f", "%f", "%d"))
    assert first == again, "microseconds would tell"
    assert first != other
    assert first != worded(None)


def test_a_site_with_another_tokenizer_is_left_out_and_told_so_when_it_comes_again(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "other")
    edited(lambda t: setattr(t, "chat_template", "hello" + tiny.CHAT)).save_pretrained(folder)
    workers = {
        name: tiny.worker(tmp_path, model, "causal_lm", name)
        for name, model in (("a", llama), ("b", folder), ("c", llama))
    }
    plan = tiny.plan(training={"local_steps": 1, "batch_size": 1}, evaluation={"before": False, "after": False})
    (done,) = federate(workers, plan, Aggregation(), 1)
    assert done.combined.refused["b"].code == "chat_template_differs"
    manifest = done.combined.manifest
    again = RoundTask(plan, done.combined.adapter, manifest, 1, 2)
    with pytest.raises(ModelError) as raised:
        workers["b"].validate(again)
    assert raised.value.code == "chat_template_differs"
    workers["b"].validate(replace(again, manifest=replace(manifest, chat_template="")))  # an older one's is not known
    with pytest.raises(ModelError) as raised:
        workers["a"].validate(replace(again, manifest=replace(manifest, tokenizer="0" * 32)))
    assert raised.value.code == "tokenizer_differs"


def test_a_classifier_does_not_ask_for_the_same_chat_template(bert: Path, tmp_path: Path) -> None:
    update = tiny.worker(tmp_path, bert, "sequence_classification").train(
        RoundTask(tiny.plan("sequence_classification", training={"local_steps": 1}))
    )
    assert update.manifest.tokenizer
    assert not update.manifest.chat_template
