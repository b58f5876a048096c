"""Bugs planted on purpose, each with the tests that must catch it: a suite that cannot fail proves nothing.

    python tests/planted_bugs.py                    all of them, two at a time
    python tests/planted_bugs.py --match refill     those whose line holds a word
    python tests/planted_bugs.py --sample 6         a few, the same whatever is edited; --seed 1 takes others

A line of the list is a bug: file, text that occurs in it exactly once, what to put there, tests. Ends with 1 when a bug
was missed, or when its text is gone and the list must follow the code.
"""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("nvflare_fm", "tests", "docs", "pyproject.toml", "constraints.txt", "job_templates")


@dataclass(frozen=True)
class Bug:
    file: str  # inside nvflare_fm/
    old: str
    new: str
    tests: str  # names in tests/, separated by spaces

    def fits(self, root: Path = ROOT) -> bool:
        file = root / "nvflare_fm" / self.file
        return file.exists() and file.read_text().count(self.old) == 1


BUGS = [
    # errors: codes
    Bug("errors.py", "partial(type(self), code=self.code)", "type(self)", "test_errors"),
    Bug("errors.py", "(self.text, self.local)", "(self.message, self.local)", "test_errors"),
    Bug("flare/wire.py", 'code="no_submission"', 'code="No submission"', "test_errors"),
    Bug("site/data/loading.py", "if not good and reason.tells_job:", "if not good and False:", "site/test_labels"),
    # synthetic rows: a vote, and training with them
    Bug(
        "site/synthetic.py",
        "        **keep.near_copies(rows.texts, _unless(should_stop, own)),\n",
        "",
        "site/test_synthetic",
    ),
    Bug("site/synthetic.py", "        if should_stop():\n", "        if False:\n", "site/test_synthetic"),
    Bug(
        "site/synthetic.py", 'plan.labels[find(row["label"], plan.labels)[0]]', "plan.labels[0]", "site/test_synthetic"
    ),
    Bug(
        "site/synthetic.py", "[number if (unit := unit_of(row, plan)) is None", "[number if True", "site/test_synthetic"
    ),
    Bug(
        "site/worker.py", "                len(job.data.train),\n            )", "            )", "site/test_synthetic"
    ),
    Bug("site/worker.py", "        if self.events.read():\n", "        if False:\n", "site/test_synthetic"),
    Bug("site/worker.py", "[*train, *held_out]", "train", "site/test_synthetic"),
    Bug("record/result.py", " or line.chosen is not None", "", "flare/test_votes"),
    Bug("site/training/fit.py", " if row < len(contents)}", "}", "site/test_synthetic"),
    Bug("site/offer/policy.py", "    if not allowed.votes:\n", "    if False:\n", "site/test_synthetic"),
    Bug(
        "site/offer/site_config.py",
        "self.floor is None and plan.votes",
        "False",
        "site/test_synthetic flare/test_votes",
    ),
    Bug("job/at_home.py", '            "synthetic": SyntheticSettings(),\n', "", "site/test_synthetic"),
    Bug("job/synthetic.py", "    if found.digest != digest:", "    if False:", "site/test_synthetic"),
    Bug("job/job_files.py", "        if name == SYNTHETIC:", "        if name.endswith(SYNTHETIC):", "test_job_files"),
    Bug("privacy/egress.py", "if asked.plan.votes and {", "if False and {", "flare/test_votes"),
    Bug("privacy/egress.py", '(protection.mechanism == "votes") !=', "bool(asked.plan.votes) !=", "flare/test_votes"),
    Bug("synthesis/tally.py", ".clamp(max=1.0)", "", "synthesis/test_tally"),
    Bug("flare/votes.py", "    check_values(update)\n", "", "flare/test_votes"),
    Bug("flare/votes.py", "    if update.report.epsilon is None:", "    if False:", "flare/test_votes"),
    # synthetic rows
    Bug("synthesis/vote.py", "1 / rows_of.get(unit, 1)", "1.0", "synthesis/test_vote"),
    Bug("synthesis/vote.py", "/ math.sqrt(count)", "/ 1", "synthesis/test_vote"),
    Bug(
        "synthesis/vote.py",
        "counts.double() + sigma * draw",
        "counts.double() + 0.5 * sigma * draw",
        "synthesis/test_vote",
    ),
    Bug("synthesis/choose.py", "if threshold < count < math.inf", "if threshold < count", "synthesis/test_choose"),
    Bug("synthesis/choose.py", "-sigma * NormalDist()", "-0.9 * sigma * NormalDist()", "synthesis/test_choose"),
    Bug("synthesis/add.py", "/ (1 - part))", ")", "synthesis/test_add"),
    Bug("synthesis/add.py", "own_label_counts.get(label, 0) if label is not None else 0", "0", "synthesis/test_add"),
    Bug("synthesis/keep.py", "range(len(said) - run + 1)", "range(len(said) - run)", "synthesis/test_keep"),
    Bug("synthesis/keep.py", "- ceil(alike * len(said)) + 1]", "- ceil(alike * len(said))]", "synthesis/test_keep"),
    Bug("synthesis/candidates.py", "    if len(data) > LARGEST:", "    if False:", "synthesis/test_candidates"),
    Bug("synthesis/candidates.py", "RecursionError, ", "", "synthesis/test_candidates"),
    Bug("synthesis/embed.py", "(hidden * mask).sum(1)", "hidden.sum(1)", "synthesis/test_models"),
    Bug("synthesis/generate.py", "with torch.random.fork_rng():", "if True:", "synthesis/test_models"),
    Bug("synthesis/vary.py", 'update={"votes": None}', "update={}", "synthesis/test_models"),
    Bug("synthesis/features.py", "SQUARES * squares])", "5 * squares])", "synthesis/test_features"),
    Bug(
        "synthesis/features.py",
        ".norm(dim=1, keepdim=True).clamp(min=1)\n    rows_of",
        ".norm(dim=1, keepdim=True).clamp(min=2)\n    rows_of",
        "synthesis/test_features",
    ),
    # differential privacy
    Bug("privacy/accountant.py", "or len(history) > _PRV_KINDS", "", "test_accountant"),
    Bug(
        "site/training/dp.py",
        "private.noise_multiplier * private.clip_norm * noise",
        "0.5 * private.noise_multiplier * private.clip_norm * noise",
        "site/test_dp",
    ),
    Bug("site/training/dp.py", "noise) / private.expected", "noise) / max(1, private.expected - 1)", "site/test_dp"),
    Bug(
        "site/training/dp.py",
        "found = [torch.cat([each[:1] + more, each[1:]])",
        "found = [torch.cat([each[:1], each[1:]])",
        "site/test_dp",
    ),
    Bug("site/training/dp.py", ".clamp(max=1.0)", "", "site/test_dp"),
    Bug("site/training/dp.py", "finite = squares.isfinite()", "finite = ~squares.isnan()", "site/test_dp"),
    Bug("site/training/dp.py", "drawn[rank::world]", "drawn", "site/test_distributed"),
    Bug("site/training/dp.py", "steps * max(1, task.total_rounds)", "steps", "site/test_dp"),
    Bug("site/training/distributed.py", "    distributed.broadcast(vector, 0)\n", "", "site/test_distributed"),
    Bug("privacy/chance.py", "mul_(-2).sqrt_()", "mul_(-1).sqrt_()", "site/test_dp"),
    Bug("privacy/chance.py", "<= probability", "<= probability / 2", "site/test_dp"),
    Bug("site/training/per_sample.py", 'base.quantization != "int8" and ', "", "site/test_dp"),
    Bug("site/training/per_sample.py", "gradients /= items", "gradients /= 1 + 0 * items", "site/test_dp"),
    Bug(
        "site/training/job_events.py",
        "within(events, protection.delta, most)",
        "within(protection.events, protection.delta, most)",
        "site/test_dp",
    ),
    Bug("site/worker.py", "        self.may_spend(protection)\n", "", "site/test_dp"),
    Bug("site/data/loading.py", "return str(value).strip()", "return str(value)", "site/test_dp"),
    # differential privacy: each site as a whole
    Bug("aggregation/noised.py", "total + spread * normal", "total + 0.5 * spread * normal", "test_noised"),
    Bug("aggregation/noised.py", "else _ROUNDING * max_norm / length", "else 1.0", "test_noised"),
    Bug("aggregation/noised.py", "min(1 / noise.expected_sites, ", "min(1 / len(accepted), ", "test_noised"),
    Bug("aggregation/noised.py", "return pair.scale * pair.B.double()", "return pair.B.double()", "test_noised"),
    Bug(
        "aggregation/noised.py",
        "LoraPair(start.A, after",
        "LoraPair(accepted[0].adapter.lora[layer].A, after",
        "test_noised",
    ),
    Bug(
        "aggregation/noised.py",
        "    for name in sorted(start.dense):\n        square",
        "    for name in ():\n        square",
        "test_noised",
    ),
    Bug("aggregation/noised.py", "if not math.isfinite(length)}", "if math.isnan(length)}", "test_noised"),
    Bug(
        "privacy/clients.py",
        "self.noise_multiplier * self.max_norm / self.expected_sites",
        "self.noise_multiplier * self.max_norm / self.expected_sites**2",
        "test_noised",
    ),
    Bug("privacy/clients.py", "    if not start:\n", "    if start is None:\n", "test_noised"),
    Bug("privacy/gaussian.py", "mu = math.sqrt(rounds) / noise_multiplier", "mu = 1 / noise_multiplier", "test_noised"),
    Bug("aggregation/combine.py", "if aggregation.client_privacy.asked:", "if False:", "test_noised"),
    Bug("flare/aggregator.py", "if private.asked:  # a choice", "if False:  # a choice", "flare/test_client_privacy"),
    Bug(
        "flare/controller.py",
        "client_privacy.asked and given.key_metric",
        "client_privacy.asked and False",
        "flare/test_client_privacy",
    ),
    Bug("flare/controller.py", "            self._check_alone()\n", "", "flare/test_client_privacy"),
    Bug(
        "job/legality.py",
        "return replace(needs, canonical=False) != Needs()",
        "return bool(needs.reads)",
        "test_legality",
    ),
    # adapter: values
    Bug("adapter.py", "return self.scale * (self.B @ self.A)", "return self.B @ self.A", "test_adapter"),
    Bug("adapter.py", "self.B * (self.scale / scale)", "self.B * (scale / self.scale)", "test_lora"),
    Bug(
        "adapter.py",
        "return self.B.shape[0], self.A.shape[1]",
        "return self.A.shape[1], self.B.shape[0]",
        "test_adapter",
    ),
    Bug("adapter.py", "in sorted((layers ^ halves) - alone)", "in sorted((layers - halves) - alone)", "test_adapter"),
    Bug("adapter.py", "in sorted(layers - set(scales))", "in []", "test_adapter test_admit"),
    Bug("adapter.py", "return bool(self.lora or self.dense)", "return bool(self.lora)", "test_adapter"),
    Bug("adapter.py", "dict.fromkeys(sorted(names)), load", "dict.fromkeys(names), load", "test_adapter"),
    # lora: the algebra
    Bug("algebra/lora.py", "weight * pair.scale * pair.B", "weight * pair.B", "test_lora"),
    Bug("algebra/lora.py", "weight * pair.scale * pair.B", "pair.scale * pair.B", "test_lora"),
    Bug("algebra/lora.py", "end] = a", "end] = a.flip(0)", "test_lora"),
    Bug("algebra/lora.py", "svd(pair.scale * r_b @ r_a.T", "svd(r_b @ r_a.T", "test_lora"),
    Bug("algebra/lora.py", "(vt * signs.T)", "vt", "test_lora"),
    Bug("algebra/lora.py", "signs = torch.sign(u.gather(", "signs = -torch.sign(u.gather(", "test_lora"),
    Bug(
        "algebra/lora.py",
        "q_b, r_b = torch.linalg.qr(pair.B.double())",
        "q_b, r_b = torch.linalg.qr(pair.B.half().double())",
        "test_lora",
    ),
    Bug("algebra/lora.py", "vt[:kept], B=u[:, :kept]", "vt[len(vt) - kept :], B=u[:, len(vt) - kept :]", "test_lora"),
    Bug("algebra/lora.py", "* vt[:kept], B=", "* vt[:kept].flip(0), B=", "test_lora"),
    Bug("algebra/lora.py", "root[:, None] ** (1 - in_b)", "root[:, None]", "test_lora"),
    Bug("algebra/lora.py", '"balanced": 0.5', '"balanced": 1.0', "test_lora"),
    Bug("algebra/lora.py", "energy = values.square()", "energy = values", "test_lora"),
    Bug("algebra/lora.py", "float(energy[kept:].sum()) + beside", "float(energy[:kept].sum()) + beside", "test_lora"),
    Bug("algebra/lora.py", "float(energy[kept:].sum()) + beside", "float(energy[kept:].sum())", "test_krylov"),
    Bug("algebra/lora.py", "keep_energy * whole", "keep_energy * energy.sum()", "test_krylov"),
    Bug("algebra/lora.py", "eps * values[:1]", "eps * max(pair.shape) * values[:1]", "test_lora"),
    Bug("algebra/lora.py", "(values > floor)", "(values >= 0)", "test_lora"),
    Bug(
        "algebra/lora.py",
        "LoraPair(pair.A[rank:], pair.B[:, rank:], pair.scale)",
        "LoraPair(pair.A[rank:], pair.B[:, rank:])",
        "test_lora",
    ),
    Bug("algebra/inner.py", "shares = terms.scale * shares.double()", "shares = shares.double()", "test_krylov"),
    Bug("algebra/inner.py", "total += part + part.T", "total += part", "test_krylov"),
    Bug("algebra/inner.py", "total.add_(part)", "part", "test_krylov"),
    Bug("algebra/inner.py", "shares[start + panel :]", "shares[:0]", "test_krylov"),
    Bug("algebra/krylov.py", "manual_seed(0)", "manual_seed(torch.seed())", "test_krylov"),
    Bug("algebra/krylov.py", "return pair.scale * result", "return result", "test_krylov"),
    Bug("algebra/krylov.py", "blocks(pair.rank, 64)", "blocks(pair.rank, 64)[:1]", "test_krylov"),
    Bug("algebra/krylov.py", "if captured - before <= max(", "if True or captured - before <= max(", "test_krylov"),
    Bug("algebra/krylov.py", ".flip(0)[:rank]", "[:rank]", "test_krylov"),
    Bug("algebra/krylov.py", "eigenvectors[:, -start.shape[1] :]", "eigenvectors[:, : start.shape[1]]", "test_krylov"),
    Bug("algebra/krylov.py", "lengths > floor", "lengths >= 0", "test_krylov"),
    Bug("algebra/krylov.py", "        x -= block @", "        x -= 0 * block @", "test_krylov"),
    Bug("algebra/lora.py", 'f"{seed}/{layer}/{row}"', 'f"{seed}/{row}"', "test_lora"),
    Bug("algebra/lora.py", 'f"{seed}/{layer}/{row}"', 'f"{seed}/{layer}/{len(rows)}/{row}"', "test_lora"),
    Bug("algebra/lora.py", 'f"{seed}/{layer}/{row}"', 'f"{layer}/{row}"', "test_lora test_combine"),
    Bug("algebra/lora.py", "fresh = fresh - (basis @ fresh) @ basis", "fresh = fresh", "test_lora"),
    Bug("algebra/lora.py", "seed, beside=pair.A)", "seed)", "test_lora"),
    Bug(
        "algebra/lora.py",
        "missing, seed, beside=pair.A).to(pair.A)",
        "missing, seed, beside=pair.A).to(pair.A) * 0",
        "test_lora",
    ),
    Bug("algebra/lora.py", "pair.B.new_zeros(", "pair.B.new_ones(", "test_lora"),
    # merge rules
    Bug("aggregation/merge/exact.py", "kept[: pair.rank] -= weight", "kept -= weight", "test_merge"),
    Bug("aggregation/merge/exact.py", "kept[: pair.rank] -= weight", "pass", "test_merge"),
    Bug(
        "aggregation/merge/exact.py", "kept[: pair.rank] -= weight", "kept[: pair.rank] -= 1 / len(pairs)", "test_merge"
    ),
    Bug("aggregation/merge/exact.py", "kept[: pair.rank] -= weight", "kept[-pair.rank :] -= weight", "test_merge"),
    Bug("aggregation/merge/exact.py", "kept.to(start.B), start.scale)", "kept.to(start.B))", "test_merge"),
    Bug("aggregation/merge/exact.py", "[1.0, *weights]", "[1.0, *[1.0 for _ in weights]]", "test_merge"),
    Bug("aggregation/merge/exact.py", 'rest="tail"', 'rest="none"', "test_merge"),
    Bug(
        "aggregation/merge/svd.py", "stack(pairs, weights)", "stack(pairs, [1 / len(pairs)] * len(pairs))", "test_merge"
    ),
    Bug("aggregation/merge/svd.py", "canonical=True", 'canonical=True, rest="tail"', "test_merge"),
    Bug("aggregation/merge/factor_mean.py", "[p.rescaled(scale) for p in pairs]", "list(pairs)", "test_merge"),
    Bug("aggregation/merge/factor_mean.py", "A=sum(w * p.A", "A=sum(p.A / len(aligned)", "test_merge"),
    Bug("aggregation/merge/factor_mean.py", "mixed_ranks=False", "mixed_ranks=True", "test_merge"),
    Bug("aggregation/merge/factor_mean.py", "exact=False", "exact=True", "test_merge"),
    Bug(
        "aggregation/merge/zero_pad.py",
        "max(start.rank, *(p.rank for p in pairs))",
        "max(p.rank for p in pairs)",
        "test_merge",
    ),
    Bug("aggregation/merge/zero_pad.py", "(0, missing)), pair.scale)", "(0, missing)))", "test_merge"),
    Bug("aggregation/merge/zero_pad.py", "pad_(pair.B, (0, missing))", "pad_(pair.B, (missing, 0))", "test_merge"),
    # weights
    Bug("aggregation/weigh/__init__.py", "else w * left / free", "else w", "test_weigh"),
    Bug("aggregation/weigh/__init__.py", "weights = [w * v for w, v in", "weights = [v for w, v in", "test_weigh"),
    Bug("aggregation/weigh/__init__.py", "all(0 <= v <", "all(-9 <= v <", "test_weigh"),
    Bug(
        "aggregation/weigh/__init__.py", "_refuse_unless(1e-300 < total <", "_refuse_unless(0 <= total <", "test_weigh"
    ),
    Bug("aggregation/weigh/examples.py", "float(update.report.examples or 0)", "1.0", "test_weigh"),
    Bug("aggregation/weigh/examples.py", "if update.report.examples is None:", "if False:", "flare/test_aggregator"),
    Bug(
        "aggregation/weigh/uniform.py",
        "[1.0] * len(cohort.updates)",
        "[float(u.report.examples) for u in cohort.updates]",
        "test_weigh",
    ),
    Bug("aggregation/merge/rank_partition.py", "reach[: pair.rank] += weight", "reach += weight", "test_merge"),
    Bug("aggregation/merge/rank_partition.py", "(reach[: start.rank] == 0)", "(reach[: start.rank] < 0)", "test_merge"),
    Bug("aggregation/merge/freeze_a.py", "LoraPair(frozen, p.B, p.scale)", "p", "test_rules"),
    Bug("aggregation/merge/alternate.py", '("B", "A")', '("A", "B")', "test_rules"),
    Bug("aggregation/merge/stack.py", "[1.0, *weights]", "[0.0, *weights]", "test_merge"),
    Bug("aggregation/weigh/skew.py", "share - a * update", "share + a * update", "test_weigh"),
    Bug("aggregation/weigh/skew.py", "/ share if share", "if share", "test_weigh"),
    Bug("aggregation/weigh/agreement.py", "cosines.fill_diagonal_(0.0)", "pass", "test_weigh"),
    Bug("aggregation/weigh/agreement.py", "sub(cosines.sum(0) * 2)", "sub(cosines.sum(0))", "test_weigh"),
    Bug("aggregation/weigh/loss.py", "max(value, 0.0) ** q", "max(value, 0.0)", "test_weigh"),
    Bug("aggregation/weigh/norm.py", "if any(norms)", "if all(norms)", "test_weigh"),
    Bug("aggregation/weigh/__init__.py", "min(max_weight, u.report.max_weight)", "max_weight", "test_weigh"),
    Bug("aggregation/weigh/__init__.py", "full |= over", "return result", "test_weigh"),
    # server steps
    Bug(
        "aggregation/step/__init__.py",
        "[self.step.keep, self.step.add]",
        "[self.step.add, self.step.keep]",
        "test_step",
    ),
    Bug("aggregation/step/__init__.py", "[1.0, float(gain)]", "[1.0, 1.0]", "test_step"),
    Bug("aggregation/step/__init__.py", "torch.tensor(self.step.first)", "torch.tensor(0.0)", "test_step"),
    Bug("aggregation/step/__init__.py", "self._squares[name] = v", "pass", "test_step"),
    Bug("aggregation/step/yogi.py", "torch.sign(v - squared)", "torch.sign(squared - v)", "test_step"),
    Bug("aggregation/step/fedexp.py", "max(rate, 1.0)", "rate", "test_step"),
    Bug("aggregation/step/__init__.py", "if learns_text and", "if", "test_step"),
    Bug("aggregation/combine.py", "step_size=taken.size", "step_size=1.0", "test_step"),
    Bug("aggregation/step/__init__.py", "return None if self.square else float", "return float", "test_step"),
    Bug("aggregation/step/__init__.py", "rule.delta and rule.canonical else", "rule.canonical else", "test_step"),
    Bug("aggregation/step/fedexp.py", "share @ cohort.products @ share", "apart", "test_step"),
    # admit: who may be merged
    Bug("aggregation/admit.py", "if not 0 < pair.scale <", "if not 0 <= pair.scale <", "test_admit"),
    Bug("aggregation/admit.py", "if not math.isfinite(length)", "if math.isnan(length)", "test_admit"),
    Bug("aggregation/admit.py", "if not math.isfinite(length)", "if math.isinf(length)", "test_admit"),
    Bug("aggregation/admit.py", "if tensor.is_floating_point() else math.nan", "", "test_admit"),
    Bug("aggregation/admit.py", "for factor in (pair.A, pair.B)", "for factor in (pair.A, pair.A)", "test_admit"),
    Bug("aggregation/admit.py", "or a[0] != b[1] ", "", "test_admit"),
    Bug("aggregation/admit.py", "for name in update.adapter.dense:", "for name in ():", "test_admit"),
    Bug("aggregation/admit.py", "pair.scale * a * b)", "a)", "test_admit"),
    Bug("aggregation/admit.py", "    _check_small(site, name, length)\n", "", "test_admit"),
    Bug("aggregation/admit.py", "lambda u: u.manifest.base,", "lambda u: '',", "test_admit"),
    Bug("aggregation/admit.py", "ours.base or None", "None", "test_admit"),
    Bug("aggregation/admit.py", "sorted(updates, key=lambda u: u.site)", "list(updates)", "test_admit test_combine"),
    Bug("aggregation/admit.py", "_shapes(u.adapter), _shapes(state)", "0, 0", "test_admit"),
    Bug("aggregation/admit.py", "if not mixed_ranks:", "if mixed_ranks:", "test_admit"),
    Bug("aggregation/admit.py", "return max(values, key", "return min(values, key", "test_admit"),
    Bug("aggregation/admit.py", "n: found[n].shape for n", "n: () for n", "test_admit"),
    Bug("aggregation/admit.py", "if ranks != {terms.padded_to or rank} or", "if", "test_admit"),
    Bug("aggregation/admit.py", "if not math.isclose(scale, asked", "if not math.isclose(scale, scale", "test_admit"),
    Bug("aggregation/admit.py", "(taken := update.report.steps) not in terms.steps", "(taken := 0)", "test_admit"),
    Bug("aggregation/admit.py", "if bool(update.adapter.lora) != terms.pairs", "if False", "test_admit"),
    Bug("aggregation/admit.py", "if (sent.task, sent.peft) !=", "if (sent.task, terms.peft) !=", "test_admit"),
    Bug("aggregation/admit.py", "if manifest else terms.base)", "if manifest else '')", "test_admit"),
    Bug("aggregation/admit.py", "of.labels, of.base_class", "of.labels", "test_admit"),
    Bug("job/settle.py", "self.sites.get(site)", "None", "test_admit"),
    Bug(
        "job/settle.py",
        "return _up_to(self.global_rank, lowered=True)",
        "return _up_to(mine.rank, True)",
        "test_admit",
    ),
    Bug("job/settle.py", "read(at_rank(mine.peft, rank))", "read(mine.peft)", "test_admit"),
    Bug("job/settle.py", '"rank" in mine.negotiable', "True", "test_admit"),
    Bug("job/settle.py", '"local_steps" in self.plan.negotiable', "False", "test_admit"),
    Bug("flare/aggregator.py", "check_terms(update, self", "(update, self", "flare/test_admission"),
    Bug("flare/aggregator.py", "        check_values(update)\n", "", "flare/test_admission"),
    Bug("flare/jobs/job.py", "if any(refused.values()):", "if False:", "flare/test_job"),
    # what follows from a job, and what a site decides, once
    Bug(
        "job/settle.py",
        "return aggregation.max_rank or ranks[widest]",
        "return aggregation.max_rank or plan.rank",
        "test_settled",
    ),
    Bug(
        "job/settle.py",
        "if aggregation.max_rank and ranks[widest] > aggregation.max_rank:",
        "if False:",
        "test_settled",
    ),
    Bug("config.py", "class TaskPlan(RoundPlan):", "class TaskPlan(Settings):", "test_settled"),
    Bug("flare/gate.py", "            _hand_over(decision, model, task)\n", "", "flare/test_decided"),
    Bug("flare/gate.py", "self._config = self._config or load_site", "self._config = load_site", "flare/test_decided"),
    Bug("flare/trainer.py", "wire.read_decided(message)", "wire.read_task(message)", "flare/test_decided"),
    Bug(
        "flare/trainer.py",
        "self._requested = wire.read_task(message).plan",
        "self._asked = task.plan",
        "flare/test_decided",
    ),
    Bug("site/worker.py", "*task.lowered, *decision.lowered", "*decision.lowered", "flare/test_decided"),
    Bug("site/worker.py", 'if plan.rest == "none":', "if False:", "site/test_attach"),
    Bug("site/peft_methods/lora.py", "            freeze(model, factors)\n", "", "site/test_attach"),
    # guard, claims and metrics: what one site can reach
    Bug("aggregation/guard/clip_norm.py", "if ratios[of] > limit:", "if False:", "test_guard"),
    Bug("aggregation/guard/clip_norm.py", '"dense tensors": [m.dense', '"dense tensors": [0 * m.dense', "test_guard"),
    Bug("aggregation/guard/clip_norm.py", '"factors A": [m.a for m', '"factors A": [0 for m', "test_guard"),
    Bug("aggregation/guard/clip_norm.py", "for length in found if length > 0", "for length in found", "test_guard"),
    Bug("aggregation/guard/clip_norm.py", "refuse if whole else most", "most", "test_guard"),
    Bug("aggregation/robust.py", "part / _scale(part.diagonal())", "part", "test_robust"),
    Bug("aggregation/robust.py", '"dense tensors": cohort.dense}', '"dense tensors": 0 * cohort.dense}', "test_robust"),
    Bug("aggregation/robust.py", ".amax(0) <= near", ".amin(0) <= near", "test_robust"),
    Bug("aggregation/robust.py", " / (1 - beta).clamp(min=ROUNDING)", "", "test_robust"),
    Bug("aggregation/robust.py", "max(usual, NOWHERE * longest)", "usual", "test_robust"),
    Bug("aggregation/robust.py", "max(2 * f + 1, count(mix, fewest(f)))", "fewest(f)", "test_robust"),
    Bug("aggregation/robust.py", "(means @ gram @ means.T, f) @ means", "(means @ gram @ means.T, f)", "test_robust"),
    Bug("aggregation/robust.py", "if not gram.isfinite().all():", "if False:", "test_robust"),
    Bug("aggregation/robust.py", "if n >= ALONE else None", "", "test_robust"),
    Bug("aggregation/robust.py", "torch.where(kept < FAINT, 0.0, kept)", "kept", "test_robust"),
    Bug("aggregation/mixing.py", "tied * (count - near", "tied * (0 * count - near", "test_robust"),
    Bug("aggregation/mixing.py", "kthvalue(count, dim=1", "kthvalue(len(gram), dim=1", "test_robust"),
    Bug("aggregation/mixing.py", "1 / len(sites)", "1 / BUCKET", "test_robust"),
    Bug(
        "aggregation/guard/geometric_median.py",
        "beta @ gram @ beta).clamp",
        "0 * (beta @ gram @ beta)).clamp",
        "test_robust",
    ),
    Bug("aggregation/guard/geometric_median.py", "2 * f + 1", "f + 1", "test_robust"),
    Bug("aggregation/guard/centered_clip.py", "beta * (1 - counts.mean())", "beta", "test_robust"),
    Bug("aggregation/guard/centered_clip.py", "apart.median()", "apart.max()", "test_robust"),
    Bug("aggregation/guard/multi_krum.py", ".values[:, 1 : len(gram) - f - 1]", ".values[:, 1:]", "test_robust"),
    Bug(
        "aggregation/guard/multi_krum.py",
        "scores.kthvalue(len(gram) - f)",
        "scores.kthvalue(len(gram) - f - 1)",
        "test_robust",
    ),
    Bug("aggregation/weigh/__init__.py", "limit * g if limit < 1 else limit", "limit", "test_robust"),
    Bug(
        "aggregation/weigh/__init__.py", "[w * g for w, g in zip(weights, left, strict=True)]", "weights", "test_robust"
    ),
    Bug("aggregation/combine.py", "0.0 if v.left_out else v.multiplier", "v.multiplier", "test_robust"),
    Bug("aggregation/merge/median.py", "tensor=medians", "", "test_robust"),
    Bug("aggregation/merge/trimmed_mean.py", "ends.clamp(max=1 - trim)", "ends", "test_robust"),
    Bug("aggregation/merge/trimmed_mean.py", "frozen_a(start, held)", "held[-1].A", "test_robust"),
    Bug("aggregation/claims.py", '"skew": shared', '"skew": list', "test_claims"),
    Bug("aggregation/claims.py", "partial(at_most, far=FAR_LOSS)", "at_most", "test_claims"),
    Bug("aggregation/weigh/norm.py", "cohort.norms], FAR_LOSS)", "cohort.norms])", "test_claims"),
    Bug("job/feasible.py", "if 0 < sites < fewest:", "if False:", "test_feasible"),
    Bug("aggregation/combine.py", "if verdict.left_out}", "if False}", "test_guard"),
    Bug("aggregation/combine.py", "c * m for c, m", "c for c, m", "test_guard"),
    Bug(
        "aggregation/combine.py",
        "parts = counts if state else first",
        "parts = counts if state else shares",
        "test_guard",
    ),
    Bug("aggregation/cohort.py", "whole * left * left[:, None] if len(left) else whole", "whole", "test_guard"),
    Bug("aggregation/combine.py", "    _check_finite(lora, dense)\n", "", "test_combine"),
    Bug("aggregation/cohort.py", "_change(pair, head(start, pair.rank))", "_change(pair, start)", "test_guard"),
    Bug("aggregation/cohort.py", "if change > NOTHING * of else 0.0", "", "test_guard"),
    Bug("aggregation/cohort.py", "whole * left * left[:, None]", "whole * left", "test_guard"),
    Bug("aggregation/claims.py", "min(v, far * u) if u > 0 else v", "v", "test_claims"),
    Bug("aggregation/claims.py", "[*values[:place], *values[place + 1 :]]", "values", "test_claims"),
    Bug("aggregation/claims.py", "max(v, _usual(values, place) / FAR)", "v", "test_claims"),
    Bug("aggregation/metrics.py", "[BELOW_HALF] * len(pairs)", "[1.0] * len(pairs)", "test_claims"),
    Bug("aggregation/metrics.py", "if len(pairs) > 2 else _mean(pairs)", "", "test_claims"),
    Bug("aggregation/metrics.py", "_reached(ordered[::-1])", "_reached(ordered)", "test_claims"),
    Bug("aggregation/salvage.py", "left_out *= 2", "left_out *= 99", "flare/test_admission"),
    Bug("aggregation/merge/freeze_a.py", ".median(dim=0).values", ".mean(dim=0)", "test_rules"),
    Bug(
        "flare/controller.py",
        "self._consider(self.ledger.line.medians)\n        return model",
        "self._consider(self.ledger.line.metrics)\n        return",
        "flare/test_admission",
    ),
    Bug(
        "flare/ledger.py",
        '            "error": combined.failed,\n',
        "",
        "flare/test_admission",
    ),
    Bug("untrusted.py", "c if c.isprintable() else", "c if True else", "test_claims"),
    Bug("untrusted.py", "whole[:longest]", "whole", "test_claims"),
    Bug("untrusted.py", "and abs(value) <= LARGEST_METRIC", "", "test_claims"),
    Bug("flare/wire.py", "if names and model.params.keys() != set(names):", "if False:", "flare/test_admission"),
    Bug("flare/wire.py", "or not _NAME.fullmatch(name)", "", "flare/test_admission"),
    Bug("flare/wire.py", "if tensor.dtype not in TYPES:", "if False:", "flare/test_admission"),
    Bug(
        "flare/wire.py", "return None if reason is None else printable(reason)", "return reason", "flare/test_admission"
    ),
    # combine: one round
    Bug("aggregation/cohort.py", "[self.layer].to(torch.float32)", "[self.layer]", "test_combine"),
    Bug(
        "aggregation/combine.py", "TrainedPairs(accepted, layer)", "list(TrainedPairs(accepted, layer))", "test_krylov"
    ),
    Bug("aggregation/merge/exact.py", "Joined([left], pairs)", "[left, *pairs]", "test_krylov"),
    Bug(
        "aggregation/cohort.py",
        "TrainedPairs(updates, layer), state",
        "list(TrainedPairs(updates, layer)), state",
        "test_krylov",
    ),
    # reads: each tensor of a site three times a round
    Bug("aggregation/step/fedexp.py", 'reads=("products",), ', "", "flare/test_reads"),
    Bug("aggregation/weigh/norm.py", 'reads=("norms",), ', "", "flare/test_reads"),
    Bug("aggregation/weigh/__init__.py", "if registry.needs([entry]).reads:", "if False:", "flare/test_reads"),
    Bug(
        "aggregation/cohort.py",
        "{need: _of(found, stay, need) for need, found in self.measured.items()}",
        "{}",
        "flare/test_reads",
    ),
    Bug(
        "adapter.py",
        "        return Waiting(self.shape, dtype, lambda: self.fetch().to(dtype))",
        "        now = self.fetch().to(dtype)\n        return Waiting(self.shape, dtype, lambda: now)",
        "flare/test_reads",
    ),
    Bug("adapter.py", "    @cached_property\n    def B", "    @property\n    def B", "flare/test_reads"),
    # record: what is written down of a round
    Bug("record/round.py", "if not _is_lost(v)}", "}", "test_result"),
    Bug("record/reason.py", "return cls(kind, *coded.groups()) if coded else", "return", "test_result"),
    Bug("record/reason.py", 'said.startswith(f"{kind}: ")', "False", "test_result"),
    Bug("record/round.py", "if not verdict.left_out}", "}", "test_result"),
    Bug("record/result.py", "min(scaled, key", "max(scaled, key", "test_result"),
    Bug(
        "flare/ledger.py",
        '            "after": mean({site: updates[site].report.after for site in weights}, weights),\n',
        "",
        "test_result",
    ),
    Bug(
        "flare/ledger.py",
        "append(run_dir / SPECTRA, Spectra(",
        "(lambda *_: None)(run_dir / SPECTRA, Spectra(",
        "test_result",
    ),
    Bug("flare/rounds.py", "Reason.of(kind, message)", "Reason(kind, message)", "flare/test_admission"),
    Bug(
        "aggregation/combine.py",
        'refused |= {site: Reason("guard", verdict.reason)',
        'refused |= {site: Reason("rejected", verdict.reason)',
        "test_guard",
    ),
    Bug("flare/rounds.py", "type(code) is str and code ==", "code ==", "flare/test_admission"),
    # the Gram matrix of a round
    Bug("aggregation/cohort.py", "return self.products + self.dense", "return self.products", "test_cohort"),
    Bug("aggregation/cohort.py", "found[sites][:, sites] if", "found[sites] if", "test_cohort"),
    Bug("aggregation/cohort.py", "every[place] = change.flatten()", "every[place] = tensor.flatten()", "test_cohort"),
    Bug(
        "aggregation/combine.py",
        "refill(short, max_rank, layer, aggregation.seed) if fixed else short",
        "short",
        "test_combine",
    ),
    Bug("aggregation/combine.py", "max_rank, layer, aggregation.seed)", "max_rank, layer, 0)", "test_combine"),
    Bug(
        "aggregation/combine.py",
        "max_rank, aggregation.sigma, aggregation.keep_energy)",
        "max_rank, keep_energy=aggregation.keep_energy)",
        "test_combine",
    ),
    Bug("aggregation/combine.py", "if rule.canonical:", "if True:", "test_combine"),
    Bug("aggregation/combine.py", "updates, rule.mixed_ranks)", "updates)", "test_combine"),
    Bug(
        "aggregation/merge/__init__.py",
        "w * t for t, w in",
        "t / len(tensors) for t, w in",
        "test_combine",
    ),
    Bug("aggregation/cohort.py", "dense[self.name].float()", "dense[self.name]", "test_combine"),
    Bug("aggregation/combine.py", "manifest=manifest or", "manifest=", "test_combine"),
    Bug("aggregation/combine.py", "state.lora[layer].to(torch.float32) if state else", "", "test_combine"),
    Bug("aggregation/combine.py", "share * usual / taken", "share * taken / usual", "test_combine"),
    Bug("aggregation/combine.py", "counts if state else first\n", "first\n", "test_combine"),
    Bug("aggregation/combine.py", "(1 - sum(counts)) * before", "0 * before", "test_combine"),
    Bug("aggregation/admit.py", "if one.site == next_.site:", "if False:", "test_admit"),
    Bug("aggregation/cohort.py", "[-held, owners(ranks)]", "[0 * held, owners(ranks)]", "test_weigh"),
    Bug("aggregation/cohort.py", "[-held, owners(ranks)]", "[-torch.ones_like(held), owners(ranks)]", "test_krylov"),
    # late: answers to earlier rounds
    Bug("aggregation/late.py", "trained.rank), -1.0)", "trained.rank), 0.0)", "test_late"),
    Bug("aggregation/late.py", "(today, 1.0)", "(today, 0.0)", "test_late"),
    Bug("aggregation/late.py", "head(before, trained.rank)", "before", "test_late"),
    Bug("aggregation/late.py", "state.dense[name].float() + change", "theirs.dense[name].float()", "test_late"),
    Bug("aggregation/late.py", 'theirs.lora if rest == "all" else Lazy(theirs.lora, pair)', "theirs.lora", "test_late"),
    Bug(
        "aggregation/late.py",
        'theirs.lora if rest == "all" else Lazy(theirs.lora, pair)',
        "Lazy(theirs.lora, pair)",
        "test_late",
    ),
    Bug("aggregation/late.py", "if late else update", "", "test_late"),
    Bug("aggregation/combine.py", "[rebased(update, state, rule.rest) for", "[update for", "test_late"),
    Bug("aggregation/weigh/staleness.py", "(1 + u.staleness) ** -a", "(1 + u.staleness) ** a", "test_late"),
    Bug("flare/ledger.py", "if not update.staleness", "", "flare/test_aggregator"),
    Bug(
        "flare/controller.py",
        "if aggregator.aggregation.max_staleness and not",
        "if False and not",
        "flare/test_aggregator",
    ),
    Bug("compare/study.py", "if not isinstance(row, dict):", "if False:", "test_compare"),
    Bug("compare/run.py", 'row.get("digest") == self.digest', "True", "test_compare"),
    Bug("compare/tuning.py", "(0.0 if study.lower_is_better else 1.0)", "2.0", "test_compare"),
    Bug("compare/tuning.py", "value < other <= value * 2", "value < other", "test_compare"),
    Bug("compare/tuning.py", 'row.get("digest") == digests[method, setting]', "True", "test_compare"),
    Bug("compare/tuning.py", "if both or setting[1] == 1", "", "test_compare"),
    Bug("compare/tuning.py", "math.inf if study.lower_is_better else -math.inf", "0.9", "test_compare"),
    Bug("compare/head_rate.py", "start + self.factor * (head - start)", "self.factor * head", "test_compare"),
    Bug(
        "compare/bench.py",
        "if name.endswith(LORA_A):\n            found",
        "if False:\n            found",
        "test_compare",
    ),
    Bug("compare/bench.py", "self._factors(done.number), rank)", '"AB", rank)', "test_compare"),
    Bug("compare/bench.py", "worker.overrides.rank if self.cuts else None", "None", "test_compare"),
    Bug(
        "compare/bench.py",
        "updates, method.aggregation, sum(self.ranks(method))",
        "updates, method.aggregation, sum(RANKS)",
        "test_compare",
    ),
    Bug("compare/bench.py", "(rounds - 1) * max(mixed)", "rounds * max(mixed)", "test_compare"),
    Bug("compare/peers.py", "GAMMA * (self.exact_rank or rank)", "int(GAMMA * rank)", "test_compare"),
    Bug("compare/results.py", 'row.get("setup") == found[-1].get("setup")', "True", "test_compare"),
    Bug(
        "compare/data_sets.py",
        "dirichlet(rows, float(alpha), seed=seed)",
        "dirichlet(rows, float(alpha))",
        "test_compare",
    ),
    Bug("compare/bench.py", "self.study.digest[:16] / name", '"same" / name', "test_compare"),
    Bug("compare/attacks/__init__.py", ".rescaled(pair.scale)", "", "test_attacks"),
    Bug("compare/attacks/alone.py", "/ stretch[:, None]", "* stretch[:, None]", "test_attacks"),
    Bug("compare/attacks/together.py", "sites // 2 + 1 - attackers", "sites // 2 - attackers", "test_attacks"),
    Bug("compare/attacks/together.py", "(along.square() + most - apart)", "(along.square() + most)", "test_attacks"),
    Bug("compare/attacks/together.py", "*[math.inf] * attackers", "", "test_attacks"),
    Bug("compare/attacks/rows.py", "round(share * len(rows))", "len(rows) // 2", "test_attacks"),
    Bug("compare/robustness.py", "if not is_target(row, self.labels):", "if True:", "test_attacks"),
    Bug("compare/robustness.py", "names[place::sites]", "names[place : place + 1]", "test_attacks"),
    Bug("flare/standing.py", "@dataclass(frozen=True, eq=False)", "@dataclass(frozen=True)", "flare/test_standing"),
    Bug("job/peft/__init__.py", 'getattr(self, "modules_to_save", ())', "()", "site/test_trainable"),
    Bug("flare/standing.py", "number - trained_in.round <= self.max_staleness", "True", "flare/test_aggregator"),
    Bug("flare/standing.py", "bool(trained_in.adapter) and", "", "flare/test_aggregator"),
    Bug("flare/standing.py", "number < self.total_rounds and", "", "flare/test_aggregator"),
    Bug("simulate.py", "number - sent.round < aggregation.max_staleness", "True", "site/test_simulate"),
    Bug("simulate.py", "if sent.adapter and number", "if number", "site/test_simulate"),
    Bug("algebra/lora.py", "energy.cumsum(0) < keep_energy", "energy.cumsum(0) <= 0", "test_lora"),
    Bug("algebra/lora.py", "torch.special.entr(energy / energy.sum())", "torch.special.entr(energy)", "test_lora"),
    Bug(
        "job/legality.py",
        "job.needs.lateness and",
        'any("staleness" in str(w) for w in job.aggregation.weigh) and',
        "test_legality",
    ),
    Bug("aggregation/step/plain.py", "learning_rate != 1", "False", "test_legality"),
    Bug("aggregation/needed.py", "[] if aggregation.step is None else [aggregation.step]", "[]", "test_legality"),
    Bug("aggregation/needed.py", "weigh.registry.needs(aggregation.weigh) | guard", "guard", "test_legality"),
    Bug("aggregation/asked.py", "(*self.labels, *other.labels)", "self.labels", "test_legality"),
    Bug("aggregation/asked.py", "self.loss or other.loss", "self.loss", "test_legality"),
    Bug("aggregation/asked.py", "self.sums or other.sums", "self.sums", "test_legality"),
    Bug("aggregation/asked.py", "else needs(**given)", "else Needs()", "test_legality"),
    Bug("aggregation/merge/__init__.py", "with_settings(rule.merge, entry, registry.kind)", "rule.merge", "test_docs"),
    Bug("job/settle.py", "turns[number % len(turns)]", "turns[0]", "test_rules"),
    Bug("job/legality.py", "if clash.holds(job):", "if False:", "test_legality"),
    Bug("job/legality.py", "head_lr_ratio) and job.task.learns_text", "head_lr_ratio) and False", "test_legality"),
    Bug("site/training/proximal.py", "self.mu * self.scale**2", "self.mu", "site/test_training"),
    Bug(
        "site/training/proximal.py",
        "a.grad.add_((b.T @ b) @ a - (b.T @ b0) @ a0, alpha=pull)",
        "pass",
        "site/test_training",
    ),
    Bug("site/training/class_shift.py", "settings.restricted_softmax)", "1.0)", "site/test_simulate"),
    Bug("site/training/class_shift.py", "(counts + 0.5) / (counts + 0.5).sum()", "counts + 0.5", "site/test_simulate"),
    Bug(
        "site/training/class_shift.py",
        "- settings.logit_adjustment * often",
        "+ settings.logit_adjustment * often",
        "site/test_simulate",
    ),
    Bug("job/settle.py", '"training": _with_head(plan, method),', "", "test_legality"),
    Bug("job/settle.py", "if given.head_lr_ratio is not None", "if given.head_lr_ratio", "test_legality"),
    Bug(
        "site/training/layerwise.py",
        "gradient.square().mean(), 1 - beta2",
        "gradient.square().sum(), 1 - beta2",
        "site/test_layerwise",
    ),
    Bug("site/training/layerwise.py", "(1 - beta1**self.steps)", "1", "site/test_layerwise"),
    Bug("site/training/layerwise.py", "(1 - beta2**self.steps)", "1", "site/test_layerwise"),
    Bug("site/training/layerwise.py", "p.grad = None", "pass", "site/test_layerwise"),
    Bug("site/training/layerwise.py", "rate * group", "group", "site/test_layerwise"),
    Bug("site/training/layerwise.py", "self.ratio * group", "group", "site/test_training"),
    Bug(
        "site/model/attach.py", "p.requires_grad and any(prefix in name", "any(prefix not in name", "site/test_training"
    ),
    Bug("job/settle.py", " and (method.factored or not method.adapts)", "", "test_legality"),
    Bug("job/settle.py", ' and given.optim != "sgd"', "", "test_legality"),
    Bug("config.py", "math.sqrt(rank / was)", "(rank / was)", "test_config"),
    Bug("config.py", 'not peft.get("use_rslora") and', "", "test_config"),
    Bug("site/offer/policy.py", "at_rank(plan.peft, value)", '{**plan.peft, "rank": value}', "site/test_policy"),
    # policy: what a site allows, before anything is loaded
    Bug("site/offer/policy.py", "_rows_per_step(plan, 1) // value", "1", "site/test_policy"),
    Bug("site/offer/policy.py", "and bound.negotiable in plan.negotiable", "", "site/test_policy"),
    Bug(
        "site/offer/policy.py",
        "gradient_accumulation_steps * processes",
        "gradient_accumulation_steps",
        "site/test_policy",
    ),
    Bug("site/offer/policy.py", "or (bound.trains and not trains)", "", "site/test_policy flare/test_evaluation"),
    Bug(
        "site/offer/policy.py",
        'Bound("labels", "max_labels", lambda plan, _: len(plan.labels), False),',
        "",
        "site/test_policy",
    ),
    Bug("site/offer/policy.py", "if trains and 0 < plan", "if 0 < plan", "site/test_policy"),
    Bug("site/offer/policy.py", "< privacy.min_update_rows:", "< 0:", "site/test_policy"),
    Bug(
        "site/offer/policy.py",
        "0 < plan.evaluation.max_examples < privacy",
        "0 > plan.evaluation.max_examples > privacy",
        "site/test_policy",
    ),
    Bug(
        "site/offer/policy.py",
        'for name in ("counts", "label_statistics")',
        'for name in ("label_statistics",)',
        "site/test_policy",
    ),
    Bug(
        "site/offer/policy.py",
        "if welcome.submitters is None and welcome.orgs is None:",
        "if False:",
        "site/test_policy",
    ),
    Bug("site/offer/policy.py", "and ANYONE not in listed", "", "site/test_policy"),
    Bug("site/offer/policy.py", "if embeddings and not limits.train_embeddings:", "if False:", "site/test_trainable"),
    Bug("site/offer/policy.py", 'if not any(f".{name}".endswith', 'if any(f".{name}".endswith', "site/test_trainable"),
    Bug("site/offer/policy.py", "if needs > limits.memory_gib", "if 0 > limits.memory_gib", "site/test_trainable"),
    Bug(
        "site/offer/policy.py",
        "if adapter.size(plan.padded_to or rank) > limits",
        "if 0 > limits",
        "site/test_trainable",
    ),
    Bug(
        "site/model/attach.py", "answers is not None and answers in (module, original)", "False", "site/test_trainable"
    ),
    Bug("site/model/attach.py", "id(p) in embeddings for p in", "False for p in", "site/test_trainable"),
    # floors, counts and the order of rows
    Bug(
        "site/worker.py",
        "if len(set(to_train)) < privacy.min_examples:",
        "if len(to_train) < privacy.min_examples:",
        "site/test_floors",
    ),
    Bug(
        "site/worker.py",
        "return len(training.different(chosen, found.contents[0]))",
        "return len(chosen)",
        "site/test_floors",
    ),
    Bug("site/worker.py", "if enough else None", "", "site/test_floors"),
    Bug("site/worker.py", "if name in told}", "}", "site/test_floors"),
    Bug("site/worker.py", 'self.log if "steps" in self._told(plan) else None', "self.log", "site/test_floors"),
    Bug("site/worker.py", "if different >= self.config", "if True or self.config", "site/test_floors"),
    Bug(
        "site/worker.py",
        "check_trained(*trained_modules(model, job.base.heads), self.config.limits)",
        "pass",
        "site/test_trainable",
    ),
    Bug("site/peft_methods/lora.py", '"lora_embedding_" in name', "False", "site/test_trainable"),
    Bug("site/data/loading.py", "// least * least", "", "site/test_data"),
    Bug("site/data/loading.py", "min(asked, count - least)", "min(asked, count)", "site/test_data"),
    Bug("site/training/fit.py", ">= least for start in starts", ">= 0 for start in starts", "site/test_floors"),
    Bug(
        "site/training/fit.py",
        'if secret else f"{plan.seed}/{site}"',
        'if False else f"{plan.seed}/{site}"',
        "site/test_floors",
    ),
    Bug("site/training/fit.py", "pass_key = _digest(seed, secret)", "pass_key = _digest(seed)", "site/test_floors"),
    Bug("site/offer/secret.py", "0o600", "0o644", "site/test_floors"),
    Bug("site/offer/secret.py", "or mode & (stat.S_IRWXG | stat.S_IRWXO)", "", "site/test_floors"),
    Bug("aggregation/weigh/skew.py", 'counts=("examples",), ', "", "test_legality"),
    # rows as people have them
    Bug("site/tasks/chat_template.py", "|= not self.text.startswith(text)", "|= False", "site/test_conversations"),
    Bug("site/tasks/chat_template.py", "if not after.startswith(before):", "if False:", "site/test_tasks"),
    Bug("site/tasks/chat_template.py", "place >= 0 and place", "place", "site/test_conversations"),
    Bug("site/tasks/chat_template.py", "len(bare) > len(before)", "len(bare) > 0", "site/test_conversations"),
    Bug("site/tasks/chat_template.py", "if len(calls) > 1 else {}", "if False else {}", "site/test_conversations"),
    Bug("site/tasks/chat_template.py", "self._check_roles()", "pass", "site/test_conversations"),
    Bug(
        "site/tasks/causal_lm.py",
        "if not _is_prompted(text, start, tokens[0], tokenizer):",
        "if False:",
        "site/test_conversations",
    ),
    Bug("site/tasks/causal_lm.py", "cut += Cut(answers=unseen)", "pass", "site/test_conversations"),
    Bug("site/tasks/causal_lm.py", " or beyond[0] == (stop, stop)", "", "site/test_conversations"),
    Bug("site/tasks/causal_lm.py", "if start < seen]", "if False]", "site/test_conversations"),
    Bug("site/tasks/conversations.py", "*([given] if given else [])", "", "site/test_conversations"),
    Bug("site/tasks/conversations.py", 'm.get("weight") == 0', "False", "site/test_conversations"),
    Bug("site/tasks/conversations.py", "i + len(first) for i", "i for i", "site/test_conversations"),
    Bug("site/tasks/causal_lm.py", "characters += start", "pass", "site/test_conversations"),
    Bug("site/tasks/conversations.py", "[i + len(before) for i in learned]", "learned", "site/test_conversations"),
    Bug("site/tasks/conversations.py", "_object(arguments or", "str(arguments or", "site/test_conversations"),
    Bug("site/tasks/conversations.py", "if each is not None", "", "site/test_conversations"),
    Bug("site/tasks/labels.py", "if whole and not numbered:", "if whole:", "site/test_labels"),
    Bug("site/tasks/labels.py", "-1 if _folded(label) in folded else place", "place", "site/test_labels"),
    Bug("site/tasks/labels.py", "if is_fraction(text):", "if False:", "site/test_labels"),
    Bug("site/tasks/token_classification.py", "if len(learned) == len(places):", "if True:", "site/test_labels"),
    Bug("site/tasks/token_classification.py", "any(word not in learned", "all(word not in learned", "site/test_labels"),
    Bug("site/data/loading.py", "self.validation_rows.index(numbers[count])", "count", "site/test_conversations"),
    Bug("site/data/loading.py", "told[row] for row in rows", "str(row) for row in rows", "site/test_data"),
    Bug("site/data/loading.py", "digests[row].update(", "digests[row].digest() or (", "site/test_data"),
    Bug("site/data/loading.py", "if not good and reason.tells_job:", "if reason.tells_job:", "site/test_labels"),
    Bug("site/data/loading.py", "found.columns.check_named(source, where)", "pass", "site/test_labels"),
    Bug("site/data/loading.py", "found.columns.check_read(source, task.columns, where)", "pass", "site/test_labels"),
    Bug("site/data/loading.py", "cut.rows > _FEW_CUT * len(found.good)", "False", "site/test_labels"),
    # the site file
    Bug("site/offer/site_yaml.py", "if name in seen:", "if False:", "site/test_site_yaml"),
    Bug("site/offer/site_yaml.py", "if isinstance(event, yaml.AliasEvent):", "if False:", "site/test_site_yaml"),
    Bug("site/offer/site_yaml.py", "if self.depth == DEPTH:", "if False:", "site/test_site_yaml"),
    Bug("site/offer/site_config.py", "lambda v: () if v is None else v", "lambda v: v", "site/test_site_yaml"),
    Bug("files.py", "| os.O_NONBLOCK", "", "site/test_site_yaml"),
    Bug("files.py", "if len(content) > limit:", "if False:", "site/test_site_yaml"),
    Bug("flare/gate.py", "if c.isprintable() else", "if True else", "flare/test_replies"),
    Bug("site/mean_pooling.py", "(hidden * counted[..., None]).sum(1)", "hidden.sum(1)", "site/test_mean_pooling"),
    Bug("site/mean_pooling.py", 'modes <= {"mean_tokens"}', "True", "site/test_mean_pooling"),
    Bug("site/mean_pooling.py", '.get("is_encoder_decoder")', '.get("")', "site/test_mean_pooling"),
    Bug("site/mean_pooling.py", 'key_mapping={rf"^{prefix}\\.": "backbone."}, ', "", "site/test_mean_pooling"),
    Bug("site/mean_pooling.py", '{"past_key_values": past_key_values}', "{}", "site/test_mean_pooling"),
    Bug(
        "site/model/attach.py",
        "return own_class(kind.__module__, kind.__qualname__)",
        'return ""',
        "site/test_mean_pooling",
    ),
    Bug(
        "site/peft_methods/lora.py",
        "target_modules=targets)",
        "target_modules=model.peft_config[LOCAL].target_modules)",
        "site/test_families",
    ),
    Bug(
        "site/tasks/token_classification.py",
        '" ".join(words), plan.max_length',
        '"".join(words), plan.max_length',
        "site/test_tasks",
    ),
    Bug(
        "site/tasks/token_classification.py",
        "places.split(words.tolist())",
        "places.split(len(places))",
        "site/test_tasks",
    ),
    Bug(
        "site/tasks/token_classification.py",
        "if all(tag == OUTSIDE",
        "if False and all(tag == OUTSIDE",
        "site/test_tasks",
    ),
    Bug("site/tasks/token_classification.py", " or not words[word].strip()", "", "site/test_tasks"),
    Bug(
        "site/tasks/token_classification.py",
        "first.append(word if is_first else None)",
        "first.append(word if start < stop else None)",
        "site/test_tasks",
    ),
    Bug("site/tasks/causal_lm.py", "spans[behind:] = [end] * (len(spans) - behind)", "pass", "site/test_tasks"),
    Bug("site/tasks/causal_lm.py", "if ends or end_token is None", "if True", "site/test_tasks"),
    Bug("site/tasks/causal_lm.py", " and not text[stop:].strip()", "", "site/test_tasks"),
    Bug(
        "site/tasks/causal_lm.py", "any(answer_start < stop <= answer_end", "any(stop == answer_end", "site/test_tasks"
    ),
    Bug("site/tasks/causal_lm.py", "is_learned and start < stop", "is_learned", "site/test_tasks"),
    Bug(
        "site/data/tokenization.py",
        "_digest([ids, sorted(tokenizer.get_vocab().items()), ",
        "_digest([ids, ",
        "site/test_tokenization",
    ),
    Bug("site/data/tokenization.py", "_digest([ids, sorted", "_digest([sorted", "site/test_tokenization"),
    Bug("site/data/tokenization.py", "tokenizer.eos_token_id]", "0]", "site/test_tokenization"),
    Bug("site/data/tokenization.py", "_NO_DATE + tokenizer", "tokenizer", "site/test_tokenization"),
    Bug("aggregation/admit.py", "keep(lambda u: u.manifest.tokenizer,", "keep(lambda u: '',", "test_admit"),
    Bug("site/worker.py", "if theirs and theirs != ours:", "if theirs != ours:", "site/test_tokenization"),
    Bug("site/worker.py", "if theirs and theirs != ours:", "if False:", "site/test_tokenization"),
    Bug("site/check/probe.py", "if float(moved[:-1].max()) > ", "if 0 > ", "site/test_probe"),
    Bug(
        "site/model/base_model.py",
        "if task.promises.learns_text and (headless",
        "if False and (headless",
        "site/test_probe",
    ),
    Bug("site/model/base_model.py", "type(config) not in known", "False", "site/test_probe"),
    Bug("site/peft_methods/__init__.py", "        check_fits(model, base)\n", "", "site/test_probe"),
    Bug("site/model/fingerprint.py", "if (folder / WEIGHTS).is_file():", "if False:", "site/test_base_model"),
    Bug(
        "site/model/fingerprint.py",
        "in (defaults.get(key), _UNSAID.get(key))",
        "in (_UNSAID.get(key),)",
        "site/test_base_model",
    ),
    Bug("site/model/fingerprint.py", "return tied.get(name, name)", "return name", "site/test_base_model"),
    Bug(
        "site/model/fingerprint.py",
        "sorted({line for lines in files for line in lines})",
        "sorted(line for lines in files for line in lines)",
        "site/test_base_model",
    ),
    Bug("site/model/fingerprint.py", "Path(name).name == name and", "", "site/test_base_model"),
    Bug("site/model/fingerprint.py", "return None if beside & computed or", "return None if", "site/test_base_model"),
    Bug(
        "site/check/probe.py",
        "module.register_forward_pre_hook(call(name))",
        "module.register_forward_pre_hook(call(''))",
        "site/test_probe",
    ),
    Bug("site/check/probe.py", 'return re.sub(r"\\b\\d+\\b", "*", name)', "return name", "site/test_probe"),
    Bug("site/check/probe.py", "else table.padding_idx + 1", "else 0", "site/test_probe"),
    Bug("site/check/probe.py", "max_length + virtual_tokens > rows", "max_length > rows", "site/test_probe"),
    Bug("site/check/probe.py", "if not 0 <= i < rows", "if not 0 <= i", "site/test_probe"),
    Bug("site/model/attach.py", "config.exclude_modules = set(base.unreached)", "pass", "site/test_probe"),
    Bug("site/model/attach.py", "    _keep_reached(base, config)\n", "", "site/test_probe"),
    Bug("site/data/loading.py", ">= vocabulary:", "< 0:", "site/test_probe"),
    Bug("site/model/base_model.py", "if unlike or sum(below", "if sum(below", "site/test_probe"),
    Bug("site/model/base_model.py", "> _MAY_LACK *", "> 2 *", "site/test_probe"),
    Bug("site/model/base_model.py", "token = tokenizer.convert_ids_to_tokens(models)", "pass", "site/test_probe"),
    Bug("job/cost.py", "0 < base.context < plan.max_length", "False", "site/test_probe"),
    Bug("site/model/base_model.py", "                    inner.clear()\n", "", "site/test_attach"),
    Bug("site/model/base_model.py", "inner.update(before)", "pass", "site/test_attach"),
    Bug("site/model/base_model.py", "            yield vars(state)", "            pass", "site/test_attach"),
    Bug("site/model/base_model.py", '"_require_grads_hooks"', '"_hooks"', "site/test_attach"),
    Bug(
        "site/model/attach.py",
        "        with base.autocast():\n            model(",
        "        with base.autocast() if False else torch.inference_mode():\n            model(",
        "site/test_attach",
    ),
    # tasks: numbers, several labels, two answers; VeRA
    Bug("job/tasks.py", "texts_per_row=2", "texts_per_row=1", "test_plan test_legality"),
    Bug("job/feasible.py", "if given and not task.numbers:", "if False:", "test_feasible"),
    Bug("job/feasible.py", "if given and len(given) != len(plan.labels):", "if False:", "test_feasible"),
    Bug("job/settle.py", "promises(plan.task).classes and", "not promises(plan.task).learns_text and", "test_legality"),
    Bug("job/legality.py", "not job.task.exclusive and _shifts", "job.task.learns_text and _shifts", "test_legality"),
    Bug("job/legality.py", "(job.task.exclusive and not job.task.per_token)", "job.task.classes", "test_legality"),
    Bug(
        "job/cost.py",
        "texts, width = plan.training.batch_size * promises(plan.task).texts_per_row",
        "texts, width = plan.training.batch_size",
        "test_plan",
    ),
    Bug("site/tasks/regression.py", "(_number(each) - m) / s", "(_number(each) - m) * s", "site/test_numbers"),
    Bug("site/tasks/regression.py", "(answer - truth) * scale", "answer - truth", "site/test_numbers"),
    Bug("site/tasks/regression.py", 'reduction="sum") / targets.shape[1]', 'reduction="sum")', "site/test_numbers"),
    Bug("site/tasks/regression.py", "if not abs(value) <= LARGEST:", "if abs(value) > LARGEST:", "site/test_numbers"),
    Bug("site/tasks/regression.py", "if max(map(abs, found)) > FARTHEST:", "if False:", "site/test_numbers"),
    Bug("site/tasks/multi_label.py", "if len(places) < len(found):", "if False:", "site/test_numbers"),
    Bug(
        "site/tasks/multi_label.py", 'answer > 0, average="micro"', 'answer > 0.5, average="micro"', "site/test_numbers"
    ),
    Bug("site/tasks/multi_label.py", 'reduction="sum") / targets.shape[1]', 'reduction="sum")', "site/test_numbers"),
    Bug(
        "site/tasks/preference.py",
        "dpo_beta * (chosen - rejected)",
        "dpo_beta * (rejected - chosen)",
        "site/test_preference",
    ),
    Bug("site/tasks/preference.py", "plan.training.dpo_beta * (", "0.1 * (", "site/test_preference"),
    Bug(
        "site/tasks/preference.py",
        "torch.no_grad(), without_adapter(base.model), base",
        "torch.no_grad(), base",
        "site/test_preference",
    ),
    Bug("site/tasks/preference.py", "parameter.requires_grad_(is_trained)", "pass", "site/test_preference"),
    Bug("site/tasks/preference.py", "            module.training = False", "            pass", "site/test_preference"),
    Bug("site/tasks/preference.py", "            module.training = True", "            pass", "site/test_preference"),
    Bug("site/tasks/preference.py", 'len(batch["input_ids"]) // 2', 'len(batch["targets"])', "site/test_preference"),
    Bug("site/tasks/preference.py", "if chosen == rejected:", "if False:", "site/test_preference"),
    Bug(
        "site/training/logits.py",
        "checkpoint(at, some, answers, use_reentrant=False)",
        "at(some, answers).detach()",
        "site/test_preference",
    ),
    Bug("job/peft/vera.py", '_key": PROJECTION_PRNG_KEY', '_key": 1', "site/test_merged"),
    Bug("job/peft/vera.py", '"save_projection": False', '"save_projection": True', "site/test_vera"),
    Bug(
        "export/peft_config.py",
        "or n.endswith((_IA3, _VERA_B, _VERA_D))}",
        "or n.endswith((_VERA_B, _VERA_D))}",
        "site/test_vera",
    ),
    # the head alone
    Bug("job/settle.py", "plan.privacy.asked and not method.adapts", "plan.privacy.asked", "test_legality"),
    Bug(
        "job/peft/head.py", "sorted({*heads, *self.modules_to_save})", "sorted(self.modules_to_save)", "site/test_head"
    ),
    Bug("site/model/states.py", '1 if self.base.quantization == "int8" else max', "max", "site/test_head"),
    Bug("site/model/states.py", "at_once - len(some))", "0)", "site/test_head"),
    Bug("site/model/states.py", "return super().train(False)", "return super().train(mode)", "site/test_head"),
    Bug("site/model/states.py", "or any(p.requires_grad for p in backbone.parameters())", "", "site/test_head"),
    Bug("site/model/states.py", "if not self.full:", "if True:", "site/test_head"),
    Bug("site/model/states.py", "row[:length]", "row[: length - 1] or row[:1]", "site/test_head"),
    Bug("site/model/states.py", 'or known.get("output_hidden_states")', "", "site/test_head"),
    Bug("site/worker.py", "_STATES_SHARE * config.limits.memory_gib", "config.limits.memory_gib", "site/test_head"),
    Bug("site/model/attach.py", "if not trained:", "if False:", "site/test_head"),
    Bug("export/peft_config.py", "method.peft_type if method else", "", "site/test_head"),
    Bug("job/cost.py", "if not adapter.below:", "if False:", "site/test_head"),
    Bug("job/legality.py", "not job.method.adapts and job.task", "False and job.task", "test_legality"),
    # logits, some at a time; memory; what a GPU needs
    Bug(
        "site/training/logits.py",
        'values[:, -batch["input_ids"].shape[1] :].flatten(0, 1)',
        "values.flatten(0, 1)",
        "site/test_logits",
    ),
    Bug("site/training/logits.py", "targets[start : start + len(some)]", "targets[: len(some)]", "site/test_logits"),
    Bug("site/training/logits.py", "summed += nats.detach()", "summed = nats.detach()", "site/test_logits"),
    Bug("site/training/logits.py", "one if other is None else one + other", "one", "site/test_logits"),
    Bug("site/training/logits.py", "else gradient[0] * saved", "else saved", "site/test_logits"),
    Bug("site/training/logits.py", "        hook.remove()", "        pass", "site/test_logits"),
    Bug("site/training/logits.py", "        del backbone.forward\n", "        pass\n", "site/test_logits"),
    Bug("site/training/logits.py", "and items > _at_once(base)", "and False", "site/test_logits"),
    Bug("site/training/logits.py", "[model.base_model, model.get_decoder()]", "[model.base_model]", "site/test_logits"),
    Bug("site/training/logits.py", "<= _CLOSE * logits.abs().max()", ">= 0", "site/test_logits"),
    Bug(
        "site/tasks/causal_lm.py",
        "pad(labels[:, 1:], (0, 1), value",
        "pad(labels[:, 1:], (1, 0), value",
        "site/test_tasks",
    ),
    Bug(
        "site/training/evaluation.py",
        'at_once = texts_at_once(len(rows), max(len(row["input_ids"]) for row in rows))',
        "at_once = len(rows)",
        "site/test_tasks",
    ),
    Bug("job/cost.py", "base.answers * min(positions, at_once)", "base.answers * positions", "test_plan"),
    Bug("job/cost.py", "measuring_bytes(base, plan) if measures else 0", "0", "test_plan"),
    Bug(
        "job/cost.py",
        "_PER_SCORE, _RECOMPUTED = 2, 2.6, 1.75",
        "_PER_SCORE, _RECOMPUTED = 3, 2.6, 1.75",
        "site/test_memory",
    ),
    Bug("job/cost.py", "return round((base.depth + 0.5) *", "return round((base.depth + 2) *", "site/test_memory"),
    Bug("site/model/shapes.py", "fans_out.count(max(fans_out, default=0))", "depth", "site/test_memory"),
    Bug("site/training/memory.py", '"out of memory", ', "", "site/test_memory"),
    Bug("site/training/memory.py", ' or getattr(error, "errno", None) == errno.ENOMEM', "", "site/test_memory"),
    Bug(
        "site/training/memory.py",
        "        traceback.clear_frames(error.__traceback__)",
        "        pass",
        "site/test_memory",
    ),
    Bug("site/training/memory.py", "torch.cuda.empty_cache()", "pass", "site/test_memory"),
    Bug("site/check/probe.py", "        if ran_out(error):\n", "        if False:\n", "site/test_memory"),
    Bug("site/training/fit.py", "_FP16_SCALE = 2.0**10", "_FP16_SCALE = 2.0**16", "site/test_training"),
    Bug("site/training/distributed.py", "torch.cuda.device_count() >= local", "True", "site/test_distributed"),
    Bug("site/model/base_model.py", "including_emulation=False", "including_emulation=True", "site/test_base_model"),
    Bug("site/model/fingerprint.py", "if means_tokens(folder):", "if False:", "site/test_mean_pooling"),
    Bug("config.py", '("uniform",),', '("examples",),', "test_combine"),
    Bug("site/training/class_shift.py", "** -0.25", "** 0.25", "site/test_simulate"),
    Bug("site/model/attach.py", 'if factors != "AB" and', "if False and", "site/test_simulate"),
    Bug("site/worker.py", "adapter = whole = shared_half(adapter)", "pass", "site/test_simulate"),
    Bug("site/model/own_adapter.py", "own.lora[n].B, own", "0 * own.lora[n].B, own", "site/test_simulate"),
    Bug(
        "site/model/base_model.py", "if _ends(name, trained_whole)", "if name in trained_whole", "site/test_base_model"
    ),
    Bug("site/training/fit.py", "self.loss_is_scaled_for_ga = True", "pass", "site/test_training"),
    # an adapter of a site's own
    Bug("site/worker.py", 'tried[-1]["loss"] < tried[best]["loss"]', "True", "site/test_personalize"),
    Bug("site/worker.py", "asked if sends else at_home(asked)", "asked", "site/test_personalize"),
    Bug("site/worker.py", "done * rows : (done + steps) * rows", "0 : steps", "site/test_personalize"),
    Bug("job/at_home.py", '            "privacy": PrivacySettings(),\n', "", "site/test_personalize"),
    Bug("job/at_home.py", '"rate": 1.0', '"rate": asked.rate', "site/test_personalize"),
    Bug("job/at_home.py", '"factors": "AB"', '"factors": plan.factors', "site/test_personalize"),
    Bug("site/offer/policy.py", "if not plan.personalize.steps:", "if False:", "site/test_personalize"),
    Bug(
        "flare/trainer.py",
        "if task.over:\n            self._personalize",
        "if False:\n            self._personalize",
        "flare/test_decided",
    ),
    Bug("flare/egress.py", "if wire.says_nothing(model):", "if not model.params:", "flare/test_egress"),
    Bug("compare/bench.py", "range(place, count, 2)", "range(0, count, 2)", "test_compare"),
    Bug("flare/aggregator.py", "check(self.aggregation.weigh, update)", "pass", "flare/test_aggregator"),
    Bug("flare/wire.py", "replace(update.manifest, labels=())", "update.manifest", "flare/test_wire"),
    Bug("flare/wire.py", "if task.plan.labels or not labels:", "if not labels:", "flare/test_wire"),
    Bug(
        "job/cost.py", "key=lambda rank: trained_bytes(adapter, plan, rank, widest)", "key=lambda rank: 0", "test_plan"
    ),
    # settings and registries
    Bug("config.py", 'extra="forbid"', 'extra="ignore"', "test_config"),
    Bug("config.py", "frozen=True, extra", "extra", "test_config"),
    Bug("config.py", "allow_inf_nan=False", "allow_inf_nan=True", "test_config"),
    Bug("config.py", "allow_inf_nan=False, strict=True", "allow_inf_nan=False", "test_config"),
    Bug("config.py", 'names.append("*")', "names.append(part)", "test_config"),
    Bug("config.py", 'if error["type"] in ("missing", "extra_forbidden"):', "if False:", "test_config"),
    Bug("config.py", "gt=0, le=10, description", "gt=0, description", "test_config"),
    Bug("registry.py", "of that name; {hint}", "{name!r}; {hint}", "test_registry flare/test_replies"),
    Bug("registry.py", "if name in self._entries:", "if False:", "test_registry"),
    Bug("registry.py", "iter(sorted(self._fill()))", "iter(sorted(self._entries))", "test_registry"),
    Bug("aggregation/combine.py", "import torch\n", "import torch\nimport transformers\n", "test_layers"),
    # plan: what a job costs
    Bug(
        "job/cost.py",
        "Description(shape, torch.float32) for name",
        "Description(shape, torch.half) for name",
        "test_plan",
    ),
    Bug("job/cost.py", '"tail": max(0, widest - rank)', '"tail": 0', "test_plan"),
    Bug("job/settle.py", "else max(ranks)", "else min(ranks)", "test_settled"),
    # templates: written once, and a job of one's own
    Bug("config.py", '.partition(". ")[0]', "", "test_config"),
    Bug(
        "flare/jobs/render_template.py", "if name in without:", "if name in without or name in given:", "test_templates"
    ),
    Bug(
        "flare/jobs/render_template.py",
        "if name not in given and field.examples:",
        "if field.examples:",
        "test_templates",
    ),
    Bug("flare/arguments.py", "*own, *taken", "*own", "flare/test_job"),
    Bug("flare/recipe.py", "(RoundPlan, Aggregation, RoundSettings)]", "(RoundPlan, Aggregation)]", "flare/test_job"),
    Bug(
        "job/templates.py",
        "found = [setting for setting in found if setting.is_set] or found",
        "found = list(found)",
        "test_cli",
    ),
    Bug(
        "job/templates.py",
        "return json.dumps(_items(value), ensure_ascii=False)",
        "return json.dumps(value)",
        "test_cli",
    ),
    Bug("flare/jobs/job.py", "if ours != theirs:", "if False:", "test_plan"),
    Bug("flare/locator.py", '"negotiable": ("rank",)', '"negotiable": ()', "flare/test_evaluation"),
    Bug("flare/jobs/new_job.py", "if folder.exists():", "if False:", "test_cli"),
    # faults: files at rest, rows of any content, jobs whose server was killed
    Bug("files.py", "os.O_NONBLOCK | ", "", "test_files"),
    Bug("files.py", "if depth > _DEPTH:", "if False:", "test_files"),
    Bug("files.py", "beside.replace(file)", "file.write_text(text)", "test_files"),
    Bug(
        "at_rest.py", "return old if old.exists() and not folder.exists() else folder", "return folder", "test_at_rest"
    ),
    Bug("at_rest.py", 'return "whole" if written ==', 'return "whole" if True or written ==', "test_at_rest"),
    Bug("at_rest.py", "            folder.rename(old)", "            shutil.rmtree(folder)", "test_at_rest"),
    Bug("at_rest.py", "            shutil.rmtree(old, ignore_errors=True)\n", "            pass\n", "test_at_rest"),
    Bug(
        "export/folder.py",
        "at_rest.condition(folder, (*NEEDED, STEP))",
        "at_rest.condition(folder, NEEDED)",
        "test_at_rest",
    ),
    Bug("export/folder.py", "or a[0] != b[1]", "", "test_at_rest"),
    Bug("export/folder.py", "if tensor.dtype not in _DTYPES:", "if False:", "test_at_rest"),
    Bug("export/step_file.py", "_under(tensors, _SQUARE))", "{})", "test_at_rest"),
    Bug(
        "export/step_file.py", "{k: float(v) for k, v in scales.items()}", "dict.fromkeys(scales, 1.0)", "test_at_rest"
    ),
    Bug(
        "flare/persistor.py",
        "_write(model, LAST, fl_ctx, step, memory)",
        "_write(model, LAST, fl_ctx)",
        "flare/test_persistor",
    ),
    Bug("flare/rounds.py", "self.panic(reason.message)", "self.panic(str(reason))", "flare/test_admission"),
    Bug("flare/controller.py", "if step == self.settled.aggregation.step:", "if True:", "flare/test_persistor"),
    Bug("site/data/rows/jsonl.py", "(ValueError, RecursionError)", "ValueError", "site/test_data"),
    Bug("site/data/rows/jsonl.py", "if len(text) > ROW_LIMIT:", "if False:", "site/test_rows"),
    Bug("site/data/rows/text.py", "if self._left < 0:", "if False:", "site/test_data"),
    Bug("site/data/rows/text.py", "block = begun + more", "block = more", "site/test_rows"),
    Bug("site/data/rows/text.py", "or no_text:", "or False:", "site/test_data"),
    Bug("site/data/rows/text.py", "if 3 * other > letters:", "if False:", "site/test_rows"),
    Bug("site/data/rows/csv.py", "source.give_back(1)", "pass", "site/test_data"),
    Bug("site/data/rows/csv.py", "if width > 1 and _are_records(", "if False and _are_records(", "site/test_data"),
    Bug("site/data/rows/csv.py", "elif any(field.strip() for field in record):", "elif record:", "site/test_rows"),
    Bug("site/data/rows/json.py", "elif wrong and not text", "elif False and not text", "site/test_rows"),
    Bug("site/data/rows/json.py", "and not all(name.isdecimal()", "and all(name.isdecimal()", "site/test_rows"),
    Bug("site/data/rows/json.py", "    except RecursionError:", "    except ZeroDivisionError:", "site/test_rows"),
    Bug("site/data/rows/conll.py", "after[0] if numbered else after[-1]", "after[0]", "site/test_rows"),
    Bug("site/data/rows/features.py", "names[value] if value >= 0 else None", "names[value]", "site/test_rows"),
    Bug("site/data/rows/excel.py", "if size > max(", "if False and size > max(", "site/test_rows"),
    Bug("site/data/rows/excel.py", "if number > _LAST:", "if False:", "site/test_rows"),
    Bug("site/data/rows/__init__.py", "if count == ROWS_LIMIT:", "if False:", "site/test_data"),
    Bug("site/data/columns.py", "if theirs not in self.names]", "if False]", "site/test_data"),
    Bug("site/data/check.py", 'said["delimiter"] = reading.delimiter', "pass", "test_cli_data"),
    Bug(
        "site/data/loading.py", "except BaseException as error:", "except ZeroDivisionError as error:", "site/test_data"
    ),
    Bug("flare/recovery.py", "[RunStatus.RUNNING, RunStatus.DISPATCHED]", "[RunStatus.RUNNING]", "flare/test_recovery"),
    Bug("flare/recovery.py", "WORKSPACE not in jobs.list_components(job_id, fl_ctx)", "True", "flare/test_recovery"),
    Bug("flare/recovery.py", "event_type != EventType.SYSTEM_BOOTSTRAP", "False", "flare/test_recovery"),
    Bug("flare/restarted.py", "token not in registered and", "", "flare/test_restarted"),
    Bug("flare/restarted.py", "found - self._reported", "found", "flare/test_restarted"),
    Bug("flare/jobs/resume.py", '"resume": True', '"resume": False', "flare/test_resume"),
    # transforms: what travels
    Bug("transforms/int8.py", "values = values.T", "values = values.flip(0).T", "test_transforms"),
    Bug("transforms/int8.py", ").round().clamp(", ").trunc().clamp(", "test_transforms"),
    Bug("transforms/int8.py", ".clamp(max=_LARGEST)", "", "test_transforms"),
    Bug(
        "transforms/int8.py",
        "blocks.abs().amax(dim=2) / MOST)",
        "blocks.abs().amax(dim=2).bfloat16().float() / MOST)",
        "test_transforms",
    ),
    Bug("transforms/bf16.py", "tensor.clamp(-_LARGEST, _LARGEST).to", "tensor.to", "test_transforms"),
    Bug(
        "transforms/compression.py",
        "if after.bytes < before.bytes else before",
        "if after else before",
        "test_transforms",
    ),
    Bug("transforms/compression.py", "return shape[1], shape[0]", "return shape[0], shape[1]", "test_transforms"),
    Bug("transforms/compression.py", "left[name] = tensor - self", "left[name] = self", "test_transforms"),
    Bug("transforms/compression.py", "if not tensor.isfinite().all():", "if False:", "test_transforms"),
    Bug(
        "transforms/packed.py",
        "if not math.isfinite(",
        "if not math.isclose(1.0, 1.0) and not math.isfinite(",
        "test_transforms",
    ),
    # encrypted sums
    Bug("encryption/ciphertexts.py", "and said.endswith(tail)", "", "test_encryption"),
    Bug("encryption/ciphertexts.py", "said.startswith(head) and ", "", "test_encryption"),
    Bug("encryption/ciphertexts.py", "* share for part", "* counted[0][1] for part", "test_encryption"),
    Bug("encryption/keys.py", "2.0 ** (bits[0] - scale - SPARE), secret", "1.0, secret", "test_encryption"),
    Bug("encryption/ciphertexts.py", "<= 2 * LARGEST", "<= 1e300", "test_encryption"),
    Bug("encryption/ciphertexts.py", "vector.size() == size and", "", "test_encryption"),
    Bug(
        "encryption/ciphertexts.py", "keys.primes - ciphertext.coeff_modulus_size() in used", "True", "test_encryption"
    ),
    Bug("encryption/keys.py", "if has_secret != secret:", "if secret and not has_secret:", "test_encryption"),
    Bug("encryption/keys.py", "if degree not in DEGREES:", "if False:", "test_encryption"),
    Bug("encryption/reader.py", "    if code:", "    if code < 0:", "test_encryption"),
    Bug("transforms/ckks.py", "if not name.endswith(LORA_A)", "", "test_encryption"),
    Bug("transforms/ckks.py", "0 < sent[name].bytes <=", "0 <=", "test_encryption"),
    Bug(
        "transforms/packed.py",
        "if self.chain.encrypts:\n            raise",
        "if False:\n            raise",
        "site/test_encrypted",
    ),
    Bug("site/model/sealed.py", "range(plan.padded_to), plan.seed", "range(plan.padded_to), 1", "site/test_encrypted"),
    Bug("site/model/sealed.py", ".rescaled(1.0)", "", "site/test_encrypted"),
    Bug("aggregation/merge/__init__.py", 'mixed_ranks=True, rest="tail")', "mixed_ranks=True)", "site/test_encrypted"),
    Bug("aggregation/admit.py", "asked = 1.0 if terms.padded_to else", "asked =", "flare/test_encrypted"),
    Bug("flare/encryption.py", "if said != LoadResult.OK:", "if said is None:", "flare/test_encrypted"),
    Bug(
        "flare/aggregator.py",
        "check_sealed(self.keys, update.adapter",
        "(lambda *_, **k: 0)(self.keys, update",
        "flare/test_encrypted",
    ),
    Bug("transforms/__init__.py", "if order.index(one.stage) >", "if order.index(one.stage) <", "test_transforms"),
    Bug("transforms/__init__.py", "if transform.needs_linear and not one.linear:", "if False:", "test_transforms"),
    Bug("transforms/__init__.py", "in reversed(list(zip(", "in list(list(zip(", "test_transforms"),
    Bug("aggregation/downlink.py", "[1.0, 1.0, -1.0]", "[1.0, 0.0, 0.0]", "test_transforms flare/test_aggregator"),
    Bug("aggregation/downlink.py", "merged.A + (ours.A - theirs.A)", "merged.A", "test_transforms"),
    Bug("aggregation/downlink.py", "return merged + (whole", "return merged - (whole", "test_transforms"),
    Bug(
        "adapter.py",
        "(sent or self.descriptions()).values()",
        "self.descriptions().values()",
        "test_transforms flare/test_wire",
    ),
    Bug("flare/wire.py", "if _transforms(content, site) != uplink:", "if False:", "flare/test_wire"),
    Bug("flare/wire.py", "if sent[name] != chain.encoded(name, before):", "if False:", "flare/test_wire"),
    Bug("flare/wire.py", "if sent.keys() != whole.keys():", "if False:", "flare/test_wire"),
    Bug(
        "flare/aggregator.py",
        "as_it_was = self.whole or task.adapter",
        "as_it_was = task.adapter",
        "flare/test_aggregator",
    ),
    Bug("job/cost.py", 'if "B" in shares else {}', "", "test_plan"),
    # what a job may say, and build
    Bug("job/hocon.py", "if unseen := _UNSEEN.search(text)", "if unseen := None", "test_hocon"),
    Bug("job/hocon.py", "if key in values:", "if False:", "test_hocon"),
    Bug("job/hocon.py", 'if written.lower() == "include":', "if False:", "test_hocon"),
    Bug("job/hocon.py", "if self.depth > MAX_DEPTH:", "if False:", "test_hocon"),
    Bug("job/hocon.py", 'values[-1] is None or values[-1] == ""', "False", "test_hocon"),
    Bug("job/job_files.py", 're.search("[{}]", value)', 're.search("{", value)', "test_job_files"),
    Bug("job/job_files.py", "if _PASSED_ON in path and", "if False and", "test_job_files"),
    Bug("job/job_files.py", 'or ".." in name.split("/")', "", "test_job_files"),
    Bug("job/job_files.py", "str(PurePosixPath(name)) for name", "name for name", "test_job_files"),
    Bug("job/job_files.py", 'folder == "config" and file in', "file in", "test_job_files"),
    Bug("job/job_files.py", "object_pairs_hook=_unique, ", "", "test_job_files"),
    Bug(
        "flare/components.py",
        '"nvflare_fm.flare.executor.PeftExecutor",',
        '"nvflare_fm.flare.executor",',
        "flare/test_components",
    ),
    Bug(
        "flare/kit/allow_list.py",
        "if not _is_ours(entry)]\n    if nvflares",
        "if True]\n    if nvflares",
        "flare/test_provision",
    ),
    Bug("flare/deployment.py", "check_archive(app_data, job_files.CLIENT)", "pass", "flare/test_deployment"),
    Bug("flare/deployment.py", "        plain_jobs_only()\n", "        pass\n", "flare/test_deployment"),
    Bug("flare/deployment.py", "if not _record(job_id, job_meta, refused):", "if False:", "flare/test_deployment"),
    Bug("flare/executor.py", "if task and task == request", "if task and request", "flare/test_call_off"),
    Bug("flare/executor.py", "engine.aux_runner.topic_table.pop(ReservedTopic.DO_TASK)", "pass", "flare/test_call_off"),
    Bug("flare/standing.py", "fetched.id)", "task.client_tasks[0].id)", "flare/test_call_off"),
    Bug("flare/persistor.py", "initial_adapter: OptionalId", "initial_adapter: str", "flare/test_job"),
    # privacy: what a site's data have cost, and what may leave
    Bug(
        "privacy/budget.py",
        "if ahead not in (0, 1) or (lines and book.seals[lines - 1] != seal):",
        "if ahead < 0:",
        "test_budget",
    ),
    Bug("privacy/budget.py", "if ahead not in (0, 1) or", "if ahead < 0 or", "test_budget"),
    Bug("privacy/budget.py", "if ahead not in (0, 1) or", "if ahead > 1 or", "test_budget"),
    Bug("privacy/budget.py", "os.fsync(descriptor)", "pass", "test_budget"),
    Bug("privacy/budget.py", "self._note(book)\n        return book", "return book", "test_budget"),
    Bug("privacy/budget.py", "self._note(book)  # a killed", "pass  # a killed", "test_budget"),
    Bug("privacy/budget.py", "os.ftruncate(descriptor, book.length)  # what", "pass  # what", "test_budget"),
    Bug(
        "privacy/budget.py",
        "with _lock(opened.fileno(), fcntl.LOCK_EX):",
        "with _lock(opened.fileno(), fcntl.LOCK_SH):",
        "test_budget",
    ),
    Bug("privacy/budget.py", "_check(book, entry.data, unit, delta, max_epsilon, entry.events)", "pass", "test_budget"),
    Bug(
        "privacy/budget.py",
        "cost([*book.of(data, unit), new], delta) > max_epsilon",
        "cost([new], delta) > max_epsilon",
        "test_budget",
    ),
    Bug(
        "privacy/budget.py",
        "cost([*book.of(data, unit), new], delta) > max_epsilon",
        "cost([*book.of(data, unit)], delta) > max_epsilon",
        "test_budget",
    ),
    Bug("privacy/budget.py", "and unit in (entry.unit, ROW)", "and unit == entry.unit", "test_budget"),
    Bug("privacy/budget.py", "entry.data == data and unit", "unit", "test_budget"),
    Bug("privacy/budget.py", 'f"{before}{said}".encode()', 'f"{said}".encode()', "test_budget"),
    Bug("privacy/budget.py", 'if line + b"\\n" != sealed(', "if False and line != sealed(", "test_budget"),
    Bug("privacy/budget.py", "os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW", "os.O_CREAT | os.O_CLOEXEC", "test_budget"),
    Bug("privacy/disclosed.py", "if step * power >= epsilon", "if step * power <= epsilon", "flare/test_egress"),
    Bug("privacy/disclosed.py", "value.keys() != Disclosed.__dataclass_fields__.keys()", "False", "flare/test_egress"),
    Bug(
        "privacy/egress.py",
        "return reason if coded and coded.group(1) in TOLD else KEPT",
        "return reason",
        "flare/test_egress",
    ),
    Bug(
        "privacy/egress.py",
        "return reason if coded and coded.group(1) in TOLD else KEPT",
        "return reason if coded else KEPT",
        "flare/test_egress",
    ),
    Bug("privacy/egress.py", "if floor.needs_noise and protection is None:", "if False:", "flare/test_egress"),
    Bug(
        "privacy/egress.py",
        "if floor.needs_encryption and not encrypts:\n        raise",
        "if False:\n        raise",
        "flare/test_egress",
    ),
    Bug("privacy/egress.py", "if protection.data != asked.plan.data:", "if False:", "flare/test_egress"),
    Bug(
        "privacy/egress.py",
        "unknown = tensors.keys() - asked.names if asked.names and not encrypts else ()",
        "unknown = ()",
        "flare/test_egress",
    ),
    Bug("privacy/egress.py", "if delta > floor.delta:", "if delta < 0:", "site/test_policy"),
    Bug("privacy/egress.py", "if floor.unit not in (unit, ROW):", "if False:", "site/test_policy"),
    Bug("privacy/egress.py", "if floor.unit not in (unit, ROW):", "if floor.unit != unit:", "site/test_policy"),
    Bug("privacy/egress.py", "privacy.epsilon > floor.max_epsilon:", "privacy.epsilon > 1e9:", "site/test_policy"),
    Bug("privacy/egress.py", "if not plan.training.local_steps:", "if False:", "site/test_policy"),
    Bug(
        "privacy/egress.py",
        "steps=plan.training.local_steps or None,",
        "steps=plan.training.local_steps or None, seconds=report.seconds,",
        "flare/test_egress",
    ),
    Bug("privacy/egress.py", "if text == NO_METRICS or _LOWERED.fullmatch(text)", "if text", "flare/test_egress"),
    Bug(
        "site/offer/site_config.py",
        "if self.max_epsilon is None and not self.required_protection:",
        "if self.max_epsilon is None:",
        "site/test_policy",
    ),
    Bug(
        "site/offer/policy.py",
        "- {*(() if floor else getattr(privacy, name))}",
        "- {*getattr(privacy, name)}",
        "site/test_policy",
    ),
    Bug(
        "flare/egress.py",
        "if floor else self._open(result, fl_ctx)",
        "if False else self._open(result, fl_ctx)",
        "flare/test_egress",
    ),
    Bug(
        "flare/egress.py",
        "except Exception as error:\n            logger",
        "except KeyError as error:\n            logger",
        "flare/test_egress",
    ),
    Bug(
        "flare/egress.py",
        "return make_reply(code if type(code) is str and code in _CODES else ReturnCode.EXECUTION_EXCEPTION)",
        "return result",
        "flare/test_egress",
    ),
    Bug(
        "flare/egress.py",
        "book = self.budget.charge(entry, privacy.unit, privacy.delta, privacy.max_epsilon)",
        "book = self.budget.verify()",
        "flare/test_egress",
    ),
    Bug(
        "flare/egress.py",
        "return _refusal(egress.public_reason(reason) if self.config().privacy.floor else reason)",
        "return result",
        "flare/test_egress",
    ),
    Bug(
        "flare/egress.py", "type(filters[-1]) is EgressFilter", "type(filters[0]) is EgressFilter", "flare/test_egress"
    ),
    Bug("flare/egress.py", "if is_framework else {}", "", "flare/test_egress"),
    Bug(
        "flare/egress.py",
        "topic in _FRAMEWORKS and not request.keys() - {ReservedHeaderKey.HEADERS}",
        "topic in _FRAMEWORKS",
        "flare/test_egress",
    ),
    Bug(
        "flare/egress.py",
        "replace(update, report=egress.public_report(update.report, asked.plan))",
        "update",
        "flare/test_egress",
    ),
    Bug("flare/egress.py", "if adapter.bytes() > self.config()", "if 0 > self.config()", "flare/test_egress"),
    Bug("flare/gate.py", "            self._need_egress(fl_ctx)\n", "", "flare/test_egress"),
    Bug("flare/gate.py", "                self._keep_submission()\n", "", "flare/test_egress"),
    Bug(
        "flare/wire.py",
        "after=_usable(report.after, site), epsilon=epsilon)",
        "after=_usable(report.after, site))",
        "flare/test_egress",
    ),
    Bug(
        "flare/kit/privacy_scope.py", "is_last = filters[-1] in", "is_last = filters[0] in", "flare/test_privacy_scope"
    ),
    Bug("flare/kit/privacy_scope.py", "if brings_code:", "if False:", "flare/test_deployment"),
    Bug(
        "flare/kit/privacy_scope.py",
        '_BUILT_FROM = ("path", "class_path", "name")',
        '_BUILT_FROM = ("path",)',
        "flare/test_deployment",
    ),
    Bug(
        "flare/kit/privacy_scope.py",
        "            yield from _built(inner)\n    elif",
        "    elif",
        "flare/test_deployment",
    ),
    Bug(
        "flare/kit/privacy_scope.py",
        "    except FmError:\n        return True",
        "    except FmError:\n        return False",
        "flare/test_deployment",
    ),
    # audit: members, canaries, the gate
    Bug(
        "privacy/audit/membership.py",
        'np.searchsorted(ranked, ours, "right")) / (2',
        'np.searchsorted(ranked, ours, "left")) / (2',
        "test_audit",
    ),
    Bug("privacy/audit/membership.py", "min(below, found - spread)", "below", "test_audit"),
    Bug("privacy/audit/membership.py", "min(below, found - spread)", "found - spread", "test_audit"),
    Bug("privacy/audit/membership.py", "members) > falling[allowed]", "members) >= falling[allowed]", "test_audit"),
    Bug(
        "privacy/audit/one_run.py",
        "beta + alpha * 2 * canaries * delta",
        "beta + alpha * canaries * delta",
        "test_audit",
    ),
    Bug("privacy/audit/one_run.py", "(1 - confidence) / len(TRIES)", "(1 - confidence) * len(TRIES)", "test_audit"),
    Bug(
        "privacy/audit/one_run.py", "ranked[high] > ranked[half - 1]", "ranked[high] >= ranked[half - 1]", "test_audit"
    ),
    Bug("privacy/audit/one_run.py", "probability[right:]", "probability[right + 1 :]", "test_audit"),
    Bug("privacy/audit/exposure.py", "below + ties / 2", "below", "test_audit"),
    Bug("privacy/audit/copying.py", "for token in (*text, _END)", "for token in text", "test_audit"),
    Bug("site/audit/measure.py", "not in {*told, *in_both}", "not in in_both", "site/test_adapter_audit"),
    Bug("site/audit/measure.py", "if content not in in_both]", "]", "site/test_adapter_audit"),
    Bug(
        "site/audit/measure.py",
        "attach(job.base, Adapter(), job.plan)",
        "attach(job.base, values, job.plan)",
        "site/test_adapter_audit",
    ),
    Bug("site/audit/canaries.py", "if canary.included)", ")", "site/test_adapter_audit"),
    Bug("site/audit/canaries.py", "stat.S_IRWXG | stat.S_IRWXO", "0", "site/test_adapter_audit"),
    Bug("site/audit/canaries.py", "os.O_CLOEXEC, 0o600)", "os.O_CLOEXEC, 0o644)", "site/test_adapter_audit"),
    Bug("site/audit/gate.py", "found.high > job.compared.largest", "found.high > 1", "site/test_adapter_audit"),
    Bug("site/audit/gate.py", "0.5 + by_chance(len(some), len(others)) > largest", "False", "site/test_adapter_audit"),
    Bug(
        "site/audit/report.py", "escape(one_line(audit.adapter))", "one_line(audit.adapter)", "site/test_adapter_audit"
    ),
    # the demos
    Bug("demo/report.py", 'max if trial.better == "min" else min', "min", "test_demo_answers"),
    Bug("demo/report.py", '{"base": results.federated[0], **trained}', '{"base": results.pooled}', "test_demo_answers"),
    Bug(
        "demo/report.py", '("federated", *_cells(trial, results.federated[-1]))', '("federated",)', "test_demo_answers"
    ),
    Bug("demo/federation.py", "key_metric_mode=trial.better", 'key_metric_mode="max"', "test_demo_answers"),
    Bug("demo/samples.py", "with tuned.disable_adapter():", "with torch.inference_mode():", "test_demo_answers"),
    Bug("demo/samples.py", "add_generation_prompt=True", "add_generation_prompt=False", "test_demo_answers"),
    Bug(
        "demo/samples.py",
        "{name: row[name] for name in _COLUMNS if",
        "{name: row[name] for name in _COLUMNS[1::2] if",
        "test_demo_answers",
    ),
    Bug("demo/medquad.py", 'fraction(row["focus"].lower()) <', 'fraction(row["question"]) <', "test_demo_answers"),
    Bug("demo/answers.py", '["federation"] if data else [', "[", "test_demo_answers"),
    Bug("demo/picture.py", "+ gap * (high - low)", "+ gap", "test_demo"),
]


def chosen(match: str, sample: int, seed: int = 0) -> list[Bug]:
    """The bugs to plant: all that match, or the few that come first by their hashes.

    A bug's hash is of itself and the seed: no edit of the code or of other bugs changes what the others' are.
    """
    bugs = [bug for bug in BUGS if match in repr(bug)]
    return sorted(bugs, key=lambda bug: _hash(bug, seed))[:sample] if sample else bugs


def _hash(bug: Bug, seed: int) -> str:
    return hashlib.sha256(f"{seed} {bug.file} {bug.old} {bug.new}".encode()).hexdigest()


def outcome(bug: Bug) -> str:
    """caught, missed, or what is wrong with the bug itself."""
    if not bug.fits():
        return "its text does not occur exactly once"
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(lambda n: (ROOT / n).exists(), COPIED):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder) / name)
        file = Path(folder) / "nvflare_fm" / bug.file
        file.write_text(file.read_text().replace(bug.old, bug.new))
        if not (child := os.fork()):
            os._exit(tested(Path(folder), [f"tests/{name}.py" for name in bug.tests.split()]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        return "caught"  # a bug that kills the process is not overlooked
    return {0: "missed", 1: "caught"}.get(status, f"the tests did not run (pytest ended with {status})")


def tested(folder: Path, tests: list[str]) -> int:
    """pytest's exit status, in a process forked for this bug alone, so that torch is imported only once."""
    import pytest

    os.chdir(folder)
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")]
    os.environ["PYTHONPATH"] = str(folder)  # what the tests start themselves must see the bug too
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=60", *tests]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only bugs whose line holds this text")
    parser.add_argument("--sample", type=int, default=0, help="only so many")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args()
    bugs, began = chosen(options.match, options.sample, options.seed), time.monotonic()
    import hypothesis  # noqa: F401  imported once, here, and inherited by every fork
    import pydantic  # noqa: F401
    import torch

    torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        outcomes = []
        for bug, what in zip(bugs, pool.imap(outcome, bugs, chunksize=1), strict=True):
            outcomes.append(what)
            print(
                f"{what:7} {bug.file:32} {' '.join(bug.old.split())[:60]:60} → {' '.join(bug.new.split())[:50]}",
                flush=True,
            )
    caught = outcomes.count("caught")
    print(f"{caught} of {len(bugs)} caught in {time.monotonic() - began:.0f} s")
    return int(caught < len(bugs))


if __name__ == "__main__":
    sys.exit(main())
