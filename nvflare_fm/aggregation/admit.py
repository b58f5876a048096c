"""Who may be merged: every update is held against the plan, the federation's layers and its values before it counts.

First what came with its tensors, then the tensors, one at a time, then the updates of a round against each other. The
answer depends on the set of updates, never on the order they came in.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..adapter import LORA_A, LORA_B, Adapter, AdapterUpdate, Manifest
from ..errors import WireError
from ..record.reason import Reason

K = TypeVar("K", bound=Hashable)
MOST_TENSORS, MOST_BYTES = 2**16, 2**35  # of an adapter
TYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1e9  # of a tensor's norm and of a pair's product; far from what float32 holds, so that no sum overflows


@dataclass(frozen=True)
class Terms:
    """What the plan of a round lets one site send."""

    task: str
    peft: str  # name of the PEFT method
    base: str = ""  # fingerprint of the base model; empty: the sites must agree
    pairs: bool = True  # whether LoRA pairs are sent
    ranks: range = range(0)  # of them
    scale: Callable[[int], float] = lambda rank: 1.0  # of a pair, by its rank
    padded_to: int = 0  # the rank at which pairs of any rank are sent, at scale 1; 0: each at its own
    steps: range | None = None  # none: as many as it likes


def check_form(adapter: Adapter, sender: str) -> None:
    """Refuses what no adapter looks like, by the descriptions of its tensors.

    Raises:
        WireError: names the sender, the tensor and what is wrong with it.
    """
    found = adapter.descriptions()
    if adapter.bytes() > MOST_BYTES:
        raise WireError(
            f"{sender} sent an adapter of {adapter.bytes()} bytes, {MOST_BYTES} are read; adapt fewer layers",
            code="too_large",
        )
    for layer in adapter.lora:
        _check_factors(found[layer + LORA_A].shape, found[layer + LORA_B].shape, layer, sender)


def _check_factors(a: tuple[int, ...], b: tuple[int, ...], layer: str, sender: str) -> None:
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not (a[1] and b[0]):
        raise WireError(
            f"{sender} sent lora_A {a} and lora_B {b} for {layer!r}; the rank of both must agree", code="factor_shapes"
        )


def check_terms(update: AdapterUpdate, terms: Terms, state: Adapter, manifest: Manifest | None) -> None:
    """Refuses an update that is not what the plan asked of its site; no tensor is read.

    Args:
        state: the global adapter that the site was sent; empty before the first round.

    Raises:
        WireError: names the site, what it sent and what was asked.
    """
    site, sent = update.site, update.manifest
    if (sent.task, sent.peft) != (terms.task, terms.peft):
        raise WireError(
            f"{site} trained {sent.task} with {sent.peft}, the plan asks {terms.task} with {terms.peft}",
            code="other_task",
        )
    if (base := manifest.base if manifest else terms.base) and sent.base != base:
        raise _rejected(site, _other_base(sent.base, base))
    if manifest and sent.tokenizer and manifest.tokenizer not in ("", sent.tokenizer):
        raise _rejected(site, _other_tokenizer(sent.tokenizer, manifest.tokenizer))
    if manifest and sent.chat_template and manifest.chat_template not in ("", sent.chat_template):
        raise _rejected(site, _other_template(sent.chat_template, manifest.chat_template))
    if terms.steps is not None and (taken := update.report.steps) not in terms.steps:
        raise WireError(
            f"{site} reports {taken or 'no'} steps, the plan asks for {_span(terms.steps)}; where its job gives it "
            "local_steps of its own, list them under the controller's `sites`",
            code="steps_not_in_plan",
        )
    if state and (theirs := _shapes(update.adapter)) != (ours := _shapes(state)):
        raise _rejected(site, _other_layers(theirs, ours))
    if bool(update.adapter.lora) != terms.pairs:
        raise WireError(
            f"{site} sent {len(update.adapter.lora)} LoRA pairs, the plan asks for {'some' if terms.pairs else 'none'}",
            code="pairs_not_in_plan",
        )
    if terms.pairs:
        _check_pairs(update, terms)


def _rejected(site: str, reason: Reason) -> WireError:
    return WireError(f"{site}: {reason.text}", code=reason.code)


def _check_pairs(update: AdapterUpdate, terms: Terms) -> None:
    site, found = update.site, update.adapter.descriptions()
    ranks = {found[layer + LORA_A].shape[0] for layer in update.adapter.lora}
    rank = update.report.rank
    if ranks != {terms.padded_to or rank} or rank not in terms.ranks:
        raise WireError(
            f"{site} reports rank {update.report.rank} and sent {sorted({*ranks, rank})}; the plan asks "
            f"for {_span(terms.ranks)}, the same in all layers. Where its job gives it another rank, list it under the "
            "controller's `sites`",
            code="rank_not_in_plan",
        )
    asked = 1.0 if terms.padded_to else terms.scale(rank)
    for layer, scale in update.adapter.scales().items():
        if not math.isclose(scale, asked, rel_tol=1e-6):
            raise WireError(
                f"{site} sent scale {scale:g} for {layer!r}, the plan asks for {asked:g} at rank {rank}. Where its job "
                "gives it another lora_alpha, list it under the controller's `sites`",
                code="scale_not_in_plan",
            )


def _span(allowed: range) -> str:
    return f"{allowed[0]}" if len(allowed) == 1 else f"{allowed[0]} to {allowed[-1]}"


def check_values(update: AdapterUpdate) -> None:
    """Refuses an update whose values are not finite, or so large that sums are not. Each tensor is read once.

    Raises:
        WireError: names the site and the tensor.
    """
    if not 0 < update.report.max_weight <= 1:
        raise WireError(
            f"{update.site} asks for a share of at most {update.report.max_weight}; it must be in (0, 1]",
            code="share_out_of_range",
        )
    for layer in update.adapter.lora:
        pair = update.adapter.lora[layer]
        if not 0 < pair.scale < float("inf"):
            raise WireError(
                f"{update.site} sent scale {pair.scale} for {layer!r}; a scale must be positive and finite",
                code="scale_not_positive",
            )
        _check_factors(tuple(pair.A.shape), tuple(pair.B.shape), layer, update.site)
        a, b = (_length(update.site, layer, factor) for factor in (pair.A, pair.B))
        _check_small(update.site, layer, pair.scale * a * b)
    for name in update.adapter.dense:
        _length(update.site, name, update.adapter.dense[name])


def _length(site: str, name: str, tensor: Tensor) -> float:
    """‖tensor‖ in float64: in one pass it tells what is not finite and what is too large."""
    length = float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) if tensor.is_floating_point() else math.nan
    if not math.isfinite(length):
        raise WireError(
            f"{site} sent values that are not finite numbers in {name!r}; its training diverged, "
            "so lower its learning rate or look at its data",
            code="not_finite",
        )
    _check_small(site, name, length)
    return length


def _check_small(site: str, name: str, length: float) -> None:
    if length > LARGEST:
        raise WireError(
            f"{site} sent values of norm {length:.1e} in {name!r}, more than {LARGEST:.0e}; its training diverged, "
            "so lower its learning rate or look at its data",
            code="values_too_large",
        )


def admit(
    state: Adapter, manifest: Manifest | None, updates: Sequence[AdapterUpdate], mixed_ranks: bool = True
) -> tuple[list[AdapterUpdate], dict[str, Reason]]:
    """Updates that belong together, sorted by site, and the reason for each that does not.

    The reference is the global adapter, or in the first round what most sites hold (by name where they tie).

    Raises:
        WireError: two updates are of the same site.
    """
    updates = sorted(updates, key=lambda u: u.site)
    for one, next_ in pairwise(updates):
        if one.site == next_.site:
            raise WireError(
                f"{one.site} answered one round twice; its first answer has to be replaced, not joined",
                code="answered_twice",
            )
    ours = manifest or Manifest("", "", "")
    same: list[tuple[Callable[[AdapterUpdate], Any], Any, Callable[[Any, Any], Reason]]] = [
        (lambda u: u.manifest.base, ours.base or None, _other_base),
        (lambda u: _kind(u.manifest), _kind(manifest) if manifest else None, _other_kind),
        (lambda u: u.manifest.tokenizer, ours.tokenizer or None, _other_tokenizer),
        (lambda u: u.manifest.chat_template, ours.chat_template or None, _other_template),
        (lambda u: _shapes(u.adapter), _shapes(state) if state else None, _other_layers),
    ]
    if not mixed_ranks:
        same.append((lambda u: _ranks(u.adapter), _ranks(state) if state else None, _other_ranks))
    refused: dict[str, Reason] = {}
    for what, expected, reason in same:
        found = [what(update) for update in updates]  # once: the answer may take reading the whole adapter
        reference = _most_common(found) if expected is None and found else expected
        others = [(u.site, w) for u, w in zip(updates, found, strict=True) if w != reference]
        refused.update({site: reason(what_it_sent, reference) for site, what_it_sent in others})
        updates = [u for u, w in zip(updates, found, strict=True) if w == reference]
    return updates, refused


def shared_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """What every site of a federation must share: layer → (fan_out, fan_in), dense name → shape. Ranks may differ."""
    found = adapter.descriptions()
    pairs = {n: (found[n + LORA_B].shape[0], found[n + LORA_A].shape[1]) for n in adapter.lora}
    return pairs | {n: found[n].shape for n in adapter.dense}


def _shapes(adapter: Adapter) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset(shared_shapes(adapter).items())


def _ranks(adapter: Adapter) -> tuple[int, ...]:
    found = adapter.descriptions()
    return tuple(found[n + LORA_A].shape[0] for n in sorted(adapter.lora))


def _most_common(values: Sequence[K]) -> K:
    counts = Counter(values)
    return max(values, key=lambda v: counts[v])


def _kind(of: Manifest) -> tuple[object, ...]:
    return of.task, of.peft, of.labels, of.base_class


def _other_base(theirs: str, ours: str) -> Reason:
    return Reason(
        "rejected",
        f"trained base model {theirs}, the federation trains {ours}; point the alias at the same weights",
        "other_base",
    )


def _other_kind(theirs: object, ours: object) -> Reason:
    return Reason(
        "rejected", f"trained (task, PEFT method, labels, class) {theirs}, the federation trains {ours}", "other_task"
    )


def _other_tokenizer(theirs: str, ours: str) -> Reason:
    return Reason(
        "rejected",
        "its tokenizer gives other ids than the federation's; use the same tokenizer files and the same version of "
        "transformers",
        "tokenizer_differs",
    )


def _other_template(theirs: str, ours: str) -> Reason:
    return Reason(
        "rejected",
        "its chat template words conversations otherwise than the federation's; use the same tokenizer files "
        "(chat_template.jinja, tokenizer_config.json)",
        "chat_template_differs",
    )


def _other_layers(theirs: frozenset[object], ours: frozenset[object]) -> Reason:
    missing, extra = sorted(map(str, ours - theirs)), sorted(map(str, theirs - ours))
    return Reason(
        "rejected",
        f"layers differ: missing {missing[:3]}, unexpected {extra[:3]} ({len(missing)} and {len(extra)} in all); "
        "use the same target_modules and base model",
        "other_layers",
    )


def _other_ranks(theirs: tuple[int, ...], ours: tuple[int, ...]) -> Reason:
    return Reason(
        "rejected",
        f"trained at rank {max(theirs)}, this merge rule needs {max(ours)} at every site; choose merge = exact",
        "other_rank",
    )
