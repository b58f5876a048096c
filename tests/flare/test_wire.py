"""What travels arrives unchanged, through NVFlare's own serialisation; what is missing is named."""

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict, _LazyRef
from nvflare.fuel.utils import fobs
from safetensors.torch import save_file

from nvflare_fm import transforms
from nvflare_fm.adapter import LORA_A, Adapter, LoraPair, RoundTask
from nvflare_fm.config import Rules, TaskPlan
from nvflare_fm.errors import ConfigError, WireError
from nvflare_fm.export.folder import Saved
from nvflare_fm.flare import wire
from nvflare_fm.privacy.events import Event
from nvflare_fm.privacy.protection import Protection
from nvflare_fm.transforms.packed import pack
from tests.codes import refused

from .messages import LAYERS, MANIFEST, adapter, same, update


def posted(model: FLModel) -> FLModel:
    """The message after NVFlare has packed and unpacked it, as between two machines."""
    fobs.register(TensorDecomposer)
    return FLModelUtils.from_shareable(fobs.loads(fobs.dumps(FLModelUtils.to_shareable(model))))


def test_what_a_trainer_states_of_its_protection_reaches_its_site() -> None:
    stated = Protection("dp_sgd", "notes", "patient_id", 1e-5, (Event(1.2, 0.03, 20), Event(1.0, 1.0)))
    sent = posted(wire.write_update(replace(update("alder", 1), protection=stated)))
    assert wire.read_protection(sent, "alder") == stated
    assert wire.read_protection(posted(wire.write_update(update("alder", 1))), "alder") is None
    with refused("protection_not_public", WireError):  # a sampling rate tells how many rows a site has
        wire.read_update(sent, "alder")


@given(
    key=st.sampled_from(["mechanism", "data", "unit", "delta", "events", "noise_multiplier", "sample_rate", "steps"]),
    value=st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just({}), st.just([])
    ),
)
def test_a_protection_that_is_none_is_refused(key: str, value: Any) -> None:
    model = wire.write_update(replace(update("alder", 1), protection=Protection(
        "dp_sgd", "notes", "row", 1e-5, (Event(1.2, 0.03, 20),))))  # fmt: skip
    content = model.meta[wire.KEY]["protection"]
    content = content if key in content else content["events"][0]
    content[key] = value
    try:
        found = wire.read_protection(model, "alder")
    except WireError as error:
        assert error.code == "wrong_type"  # noqa: PT017
        return
    assert found is not None
    assert found.mechanism == "dp_sgd"
    assert 0 < found.delta < 1
    assert 0 < len(found.data) <= 256
    assert all(e.noise_multiplier > 0 and 0 < e.sample_rate <= 1 and e.steps >= 1 for e in found.events)
    assert found.events


def test_an_update_arrives_bit_for_bit_and_under_the_name_nvflare_authenticated() -> None:
    sent = update("calls-itself-cedar", seed=1)
    got = wire.read_update(posted(wire.write_update(sent)), "alder")
    assert same(got.adapter, sent.adapter)
    assert (got.site, got.manifest, got.report) == ("alder", sent.manifest, sent.report)


def test_no_list_of_labels_leaves_a_site_and_the_server_knows_the_ones_it_asked_for() -> None:
    manifest = replace(MANIFEST, labels=("calm", "ill"))
    sent = replace(update("alder", seed=1), manifest=manifest)
    message = wire.write_update(sent)
    assert "calm" not in repr(message.meta)
    assert wire.read_update(posted(message), "alder", ("calm", "ill")).manifest == manifest


def test_what_a_site_submits_names_no_labels_and_is_measured_with_those_of_the_job() -> None:
    plan = TaskPlan(task="sequence_classification", labels=("calm", "ill"))
    manifest = replace(MANIFEST, labels=plan.labels)
    message = wire.write_submission(adapter(0), manifest, plan)
    assert "calm" not in repr(message.meta)
    task = wire.labelled(wire.read_task(posted(message)), plan.labels)
    assert (task.plan, task.manifest) == (plan, manifest)
    own = RoundTask(plan, adapter(0), manifest)
    assert wire.labelled(own, ("other", "names")) is own
    assert wire.labelled(wire.read_task(posted(message)), ()).plan.labels == ()


def test_a_task_arrives_with_its_plan_and_round() -> None:
    task = RoundTask(TaskPlan(seed=3, peft={"method": "lora", "rank": 2}), adapter(0), MANIFEST, 4, 9)
    got = wire.read_task(posted(wire.write_task(task)))
    assert same(got.adapter, task.adapter)
    assert replace(got, adapter=Adapter()) == replace(task, adapter=Adapter())


def test_the_first_task_needs_no_adapter() -> None:
    got = wire.read_task(posted(wire.write_task(RoundTask(TaskPlan()))))
    assert not got.adapter
    assert got.manifest is None


def test_a_refusal_arrives_as_a_reply_with_its_reason() -> None:
    got = posted(wire.write_refusal("rank 64 is more than this site allows"))
    assert wire.refused(got) == "rank 64 is more than this site allows"
    assert not got.params
    assert got.metrics == {}


def test_a_refused_submission_cannot_be_mistaken_for_an_adapter() -> None:
    with refused("no_submission", WireError, "it has not trained"):
        wire.read_task(posted(wire.write_refusal("it has not trained")))


def test_parameters_views_and_gradients_travel_as_plain_tensors() -> None:
    wide = torch.randn(4, 6, requires_grad=True)
    pair = LoraPair(wide[:, ::2], torch.nn.Parameter(torch.randn(4, 4)).T, 1.0)
    got = wire.read_saved(*_parts(posted(wire.write_saved(Saved(Adapter({"l": pair}), MANIFEST)))), "alder")
    assert torch.equal(got.adapter.lora["l"].A, wide.detach()[:, ::2])
    assert torch.equal(got.adapter.lora["l"].B, pair.B.detach())


@pytest.mark.parametrize("name", ["scales", "manifest", "report"])
def test_a_site_that_leaves_something_out_is_refused_by_name(name: str) -> None:
    model = wire.write_update(update("alder", 1))
    del model.meta[wire.KEY][name]
    with refused("incomplete_message", WireError, "alder", name):
        wire.read_update(model, "alder")


def test_a_missing_scale_names_site_and_layer() -> None:
    model = wire.write_update(update("alder", 1))
    layer, _ = model.meta[wire.KEY]["scales"].popitem()
    with refused("no_scale", WireError, "alder", layer):
        wire.read_update(model, "alder")


@pytest.mark.parametrize("meta", [{}, {wire.KEY: {"version": 2}}, {wire.KEY: "x"}, {wire.KEY: {}}])
def test_another_version_is_refused_by_name(meta: dict[str, Any]) -> None:
    model = wire.write_update(update("alder", 1))
    model.meta = meta
    with refused("other_version", WireError, "alder"):
        wire.read_update(model, "alder")


@pytest.mark.parametrize(
    ("name", "value"),
    [("scales", {"l": "wide"}), ("scales", [1]), ("manifest", {"base": 3}), ("report", {"examples": "many"})],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    model = wire.write_update(update("alder", 1))
    model.meta[wire.KEY][name] = value
    with refused("wrong_type", WireError, "alder", name):
        wire.read_update(model, "alder")


@pytest.mark.parametrize("examples", [0, -5, 10**9 + 1])
def test_an_update_from_no_examples_or_from_more_than_there_can_be_is_refused(examples: int) -> None:
    with refused("wrong_type", WireError, "alder", "report.examples"):
        wire.read_update(wire.write_update(update("alder", 1, examples=examples)), "alder")


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["x" * 10**7], "tensor_name"),
        ([7], "tensor_name"),
        (["a\nb"], "tensor_name"),
        (range(200_000), "too_many_tensors"),
    ],
    ids=["long", "no text", "two lines", "many"],
)
def test_in_the_first_round_names_are_bounded_in_number_length_and_letters(names: Any, code: str) -> None:
    model = wire.write_update(update("alder", 1))
    model.params.update(dict.fromkeys(names, torch.ones(2)))
    with pytest.raises(WireError) as refused:
        wire.read_update(model, "alder")
    assert refused.value.code == code


def test_something_that_is_not_a_tensor_is_refused_by_name() -> None:
    model = wire.write_update(update("alder", 1))
    model.params["head"] = [1.0, 2.0]
    with refused("tensor_type", WireError, "alder", "list", "'head'"):
        wire.read_update(model, "alder")


def on_disk(model: FLModel, folder: Path) -> FLModel:
    """As NVFlare leaves the tensors of a message on its disk: a file each."""
    files = {name: (str(folder / f"{place}.safetensors"), name) for place, name in enumerate(model.params)}
    for name, (file, key) in files.items():
        save_file({key: model.params[name]}, file)
    kept = LazyTensorDict(files, str(folder))
    model.params = {name: kept.make_lazy_ref(name) for name in files}
    return model


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read from disk, as they are."""
    read, names = _LazyRef.materialize, []
    monkeypatch.setattr(_LazyRef, "materialize", lambda ref: (names.append(ref.key), read(ref))[1])
    return names


@pytest.mark.usefixtures("malformed_allowed")  # the checks of a test run would fetch values to look at them
def test_tensors_left_on_disk_are_described_unread_and_fetched_one_layer_at_a_time(
    tmp_path: Path, fetched: list[str]
) -> None:
    sent = update("alder", 1)
    got = wire.read_update(on_disk(wire.write_update(sent), tmp_path), "alder")
    assert got.adapter.descriptions() == sent.adapter.descriptions()
    assert (got.adapter.scales(), got.adapter.bytes()) == (sent.adapter.scales(), sent.adapter.bytes())
    layer = sorted(got.adapter.lora)[0]
    pair, its = got.adapter.lora[layer], sent.adapter.lora[layer]
    assert (pair.rank, pair.shape, pair.scale, pair.bytes) == (its.rank, its.shape, its.scale, its.bytes)
    assert fetched == []
    _ = pair.A, pair.A
    assert fetched == [layer + LORA_A]
    halved = replace(pair, scale=pair.scale / 2)
    torch.testing.assert_close(2 * halved.delta(), its.delta())
    assert same(got.adapter, sent.adapter)


INT8 = transforms.read(("int8",), "uplink")


def encoded(site: str = "alder", seed: int = 1) -> tuple[FLModel, Adapter]:
    """A site's message in int8, and the adapter that its receiver reads."""
    sent = update(site, seed)
    packed = pack(sent.adapter, INT8, site)
    return wire.write_update(sent, packed), packed.adapter()


def test_an_encoded_update_arrives_as_its_sender_decodes_it_and_its_bytes_are_those_sent() -> None:
    message, expected = encoded()
    got = wire.read_update(posted(message), "alder", uplink=("int8",))
    assert same(got.adapter, expected)
    travelled = sum(t.numel() * t.element_size() for t in message.params.values())
    assert got.adapter.bytes_sent() == travelled < got.adapter.bytes() == update("alder", 1).adapter.bytes()


def test_a_task_and_a_submission_arrive_encoded_and_tell_how() -> None:
    task = RoundTask(TaskPlan(downlink=("int8",)), adapter(0), MANIFEST, 4, 9)
    packed = pack(task.adapter, INT8, "the server")
    assert same(wire.read_task(posted(wire.write_task(task, packed))).adapter, packed.adapter())
    message = wire.write_submission(adapter(0), MANIFEST, TaskPlan(uplink=("int8",)), packed)
    assert same(wire.read_task(posted(message)).adapter, packed.adapter())


@pytest.mark.usefixtures("malformed_allowed")
def test_an_encoded_tensor_left_on_disk_is_described_unread_and_decoded_when_it_is_read(
    tmp_path: Path, fetched: list[str]
) -> None:
    message, expected = encoded()
    got = wire.read_update(on_disk(message, tmp_path), "alder", uplink=("int8",))
    assert got.adapter.descriptions() == expected.descriptions()
    assert got.adapter.bytes_sent() == expected.bytes_sent()
    assert fetched == []
    assert same(got.adapter, expected)


@pytest.mark.parametrize(("sends", "asked"), [((), ("int8",)), (("int8",), ()), (("int8",), ("bf16",))])
def test_a_site_that_encodes_otherwise_than_asked_is_refused(sends: Rules, asked: Rules) -> None:
    sent = update("alder", 1)
    message = wire.write_update(sent, pack(sent.adapter, transforms.read(sends, "uplink"), "alder"))
    with pytest.raises(WireError) as refused:
        wire.read_update(message, "alder", uplink=asked)
    assert refused.value.code == "other_encoding"


LAYER_A = sorted(LAYERS)[0] + LORA_A


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda m: m.params.update({LAYER_A: m.params[LAYER_A][:-1]}), "encoded_size"),
        (lambda m: m.params.update({LAYER_A: m.params[LAYER_A].char()}), "tensor_type"),
        (lambda m: m.params.update({LAYER_A: torch.ones(3, 5)}), "encoded_size"),
        (lambda m: of_tensor(m).update(shape=[3, 6]), "encoded_size"),
        (lambda m: of_tensor(m).update(shape=[2**35] * 8), "encoded_size"),
        (lambda m: of_tensor(m).update(shape=[2] * 9), "wrong_type"),
        (lambda m: of_tensor(m).update(shape=[-3, -5]), "wrong_type"),
        (lambda m: of_tensor(m).update(dtype="F64"), "wrong_type"),
        (lambda m: m.meta[wire.KEY]["encoded"]["tensors"].pop(LAYER_A), "encoded_names"),
        (
            lambda m: m.meta[wire.KEY]["encoded"].update(tensors=dict.fromkeys(map(str, range(70_000)))),
            "too_many_tensors",
        ),
        (lambda m: m.meta[wire.KEY]["encoded"].update(by="int8 "), "wrong_type"),
        (lambda m: m.meta[wire.KEY]["encoded"].pop("by"), "incomplete_message"),
    ],
)
def test_a_description_that_does_not_fit_what_came_is_refused(damage: Any, code: str) -> None:
    message, _ = encoded()
    damage(message)
    with pytest.raises(WireError) as refused:
        wire.read_update(message, "alder", uplink=("int8",))
    assert refused.value.code == code


def of_tensor(message: FLModel) -> dict[str, Any]:
    found: dict[str, Any] = message.meta[wire.KEY]["encoded"]["tensors"][LAYER_A]
    return found


def test_a_transform_that_a_site_does_not_know_is_refused_by_code() -> None:
    task = RoundTask(TaskPlan(), adapter(0), MANIFEST)
    message = wire.write_task(task, pack(task.adapter, INT8, "the server"))
    message.meta[wire.KEY]["encoded"]["by"] = ["int4"]
    with pytest.raises(ConfigError) as refused:
        wire.read_task(message)
    assert refused.value.code == "unknown_name"


class Colour(Enum):
    RED = "red"


def test_meta_holds_plain_python_only() -> None:
    value = {"a": {Colour.RED, "blue"}, 2: (numpy.float64(0.5), numpy.float32(2.0).item()), "n": None, "b": True}
    got = wire.plain(value)
    assert got == {"a": ["blue", "red"], "2": [0.5, 2.0], "n": None, "b": True}
    assert type(got["2"][0]) is float
    with refused("not_plain", WireError, "Tensor"):
        wire.plain({"x": torch.zeros(1)})


def _parts(model: FLModel) -> tuple[Any, Any]:
    return model.params, model.meta
