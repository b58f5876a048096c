"""Encoders that were trained on the mean of their tokens are classified on it, padding not counted."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import Aggregation
from nvflare_fm.errors import ModelError
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.simulate import federate
from nvflare_fm.site.mean_pooling import MeanPooledForSequenceClassification, means_tokens
from nvflare_fm.site.model.fingerprint import fingerprint
from tests.codes import refused
from tests.site import tiny

OLD = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}


def declared(model: Path, folder: Path, said: dict[str, Any], path: str = "1_Pooling") -> Path:
    """A copy of `model` as sentence-transformers saves it."""
    shutil.copytree(model, folder)
    modules = [("", "Transformer"), (path, "Pooling")]
    listed = [{"path": p, "type": f"sentence_transformers.models.{kind}"} for p, kind in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / path).mkdir()
    (folder / path / "config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def averaged(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return declared(bert, tmp_path_factory.mktemp("averaged") / "model", OLD)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (OLD, True),
        ({"pooling_mode": "mean"}, True),
        (OLD | {"pooling_mode_max_tokens": True}, False),
        (OLD | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False),
        ({"pooling_mode": "cls"}, False),
        ({"pooling_mode": "mean", "pooling_mode_cls_token": True}, False),
    ],
)
def test_the_folder_says_what_its_embedding_is(bert: Path, tmp_path: Path, said: dict[str, Any], answer: bool) -> None:
    assert means_tokens(declared(bert, tmp_path / "model", said, "pool")) is answer
    assert not means_tokens(bert)


def test_a_model_that_also_decodes_is_left_to_transformers_own_class(bert: Path, tmp_path: Path) -> None:
    model = declared(bert, tmp_path / "model", OLD)
    config = json.loads((model / "config.json").read_text()) | {"is_encoder_decoder": True}
    (model / "config.json").write_text(json.dumps(config))
    assert not means_tokens(model)


@pytest.mark.parametrize(
    "modules", ["{", "[1]", "{}", '[{"type": "x.Pooling"}]', '[{"type": "x.Pooling", "path": "no"}]']
)
def test_what_cannot_be_read_is_an_error_with_a_remedy_and_no_path(bert: Path, tmp_path: Path, modules: str) -> None:
    model = declared(bert, tmp_path / "model", OLD)
    (model / "modules.json").write_text(modules)
    with refused("pooling_unreadable", ModelError) as raised:
        means_tokens(model)
    assert str(tmp_path) not in raised.value.message


def test_weights_are_found_whether_they_were_saved_alone_or_under_a_head(
    bert: Path, averaged: Path, tmp_path: Path
) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    classifier.save_pretrained(tmp_path / "under")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "under")
    under = declared(tmp_path / "under", tmp_path / "model", OLD)
    one, other = (MeanPooledForSequenceClassification.from_pretrained(f, num_labels=3) for f in (averaged, under))
    for name, weight in one.backbone.named_parameters():
        assert torch.equal(weight, other.backbone.get_parameter(name)), name


def test_the_logits_are_those_of_the_mean_over_real_tokens(averaged: Path) -> None:
    model = MeanPooledForSequenceClassification.from_pretrained(averaged, num_labels=3).eval()
    words = AutoTokenizer.from_pretrained(averaged)(["well", "patient 1 walks"], return_tensors="pt", padding=True)
    hidden = AutoModel.from_pretrained(averaged).eval()(words.input_ids, words.attention_mask).last_hidden_state
    for row, states, mask in zip(model(**words).logits, hidden, words.attention_mask, strict=True):
        torch.testing.assert_close(row, model.classifier(states[mask.bool()].mean(0)))
    assert int(words.attention_mask.sum()) < words.attention_mask.numel()


def test_the_same_weights_read_in_another_way_are_another_base_model(bert: Path, averaged: Path) -> None:
    assert fingerprint(averaged) != fingerprint(bert)


@pytest.mark.parametrize("quantization", ["fp32", "nf4"])
def test_what_a_federation_trained_loads_on_the_same_class(averaged: Path, tmp_path: Path, quantization: str) -> None:
    plan = tiny.plan("sequence_classification", quantization=quantization, training={"learning_rate": 5e-3})
    worker = tiny.worker(tmp_path, averaged, "sequence_classification")
    first, second = federate({"site-1": worker}, plan, Aggregation(), 2)
    assert second.reports["site-1"].after["loss"] < first.reports["site-1"].before["loss"]
    if quantization == "fp32":
        folder = write_adapter(tmp_path / "adapter", Saved(second.combined.adapter, second.combined.manifest))
        base = MeanPooledForSequenceClassification.from_pretrained(averaged, num_labels=3)
        model = PeftModel.from_pretrained(base, folder).eval()
        rows = tiny.rows("sequence_classification")
        words = AutoTokenizer.from_pretrained(averaged)([r["text"] for r in rows], return_tensors="pt", padding=True)
        truth = torch.tensor([tiny.LABELS.index(r["label"]) for r in rows])
        task = RoundTask(plan, second.combined.adapter, second.combined.manifest)
        loss = torch.nn.functional.cross_entropy(model(**words).logits, truth)
        assert float(loss) == pytest.approx(worker.validate(task)["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "rate"),
    [("lora", 5e-3), ("ia3", 5e-2), ("prompt_tuning", 5e-2), ("prefix_tuning", 5e-2)],
)
def test_every_peft_method_learns_on_it(averaged: Path, tmp_path: Path, method: str, rate: float) -> None:
    training = {"local_steps": 6, "learning_rate": rate}
    plan = tiny.plan("sequence_classification", peft={"method": method}, training=training)
    worker = tiny.worker(tmp_path, averaged, "sequence_classification")
    first, second = federate({"site-1": worker}, plan, Aggregation(), 2)
    assert second.reports["site-1"].after["loss"] < first.reports["site-1"].before["loss"] - 0.1


def test_an_adapter_says_which_class_it_needs(bert: Path, averaged: Path, tmp_path: Path) -> None:
    for model, expected in ((averaged, MeanPooledForSequenceClassification), (bert, None)):
        (done,) = federate(
            {"site-1": tiny.worker(tmp_path, model, "sequence_classification")},
            tiny.plan("sequence_classification"), Aggregation(), 1,
        )  # fmt: skip
        folder = write_adapter(tmp_path / "adapter", Saved(done.combined.adapter, done.combined.manifest))
        said = json.loads((folder / "adapter_config.json").read_text()).get("auto_mapping")
        needed = getattr(import_module(said["parent_library"]), said["base_model_class"]) if said else None
        assert needed is expected
