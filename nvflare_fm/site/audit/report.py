"""The report of an audit: the same findings for a terminal and as a file that a data-protection officer can keep.

It holds no row, no label and no path. Names that others chose are escaped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from statistics import mean, median
from typing import Any

from ...config import PrivacySettings
from ...privacy.audit.exposure import CANDIDATES, Exposure
from ...privacy.audit.membership import LEAST, curve
from ...untrusted import one_line
from .measure import Audit, Copies
from .picture import draw

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:46em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;width:100%}td{border-top:1px solid #ccc;padding:.25em .5em;vertical-align:top;"
    "overflow-wrap:anywhere}td:first-child{width:45%}svg{max-width:100%}p.finding{font-weight:bold}"
)
CANNOT = (
    "An attack that finds nothing proves nothing: a better attack may find more. Only differential privacy bounds all "
    "attacks.",
    "The AUC is a mean over rows. A few rows may be given away while it stays near ½; look at the shares found at few "
    "false alarms, and plant canaries.",
    "The comparison needs rows to train on and rows held out of the same kind, and no row held out may be known to the "
    "adapter. Rows of other years, wards or patients in one of the two are told apart without any leak.",
    "All rows to train on count as members, those that the job's steps did not reach among them.",
    "The interval takes rows for independent. Where several rows are of one patient, the true interval is wider.",
    "Canaries show what one training leaks of rows as unusual as they are. Their bound counts only if the adapter was "
    "trained on the data set that holds them, and the coins were secret until then.",
    "Secrets and copies are looked at with greedy writing and with losses; other prompts may draw out more.",
    "It is about this adapter and this site's rows. Updates of single rounds, which the server saw, may tell more.",
)
HOW = (
    "Membership: loss without the adapter minus loss with it, a row at a time (arXiv:2111.08440). AUC: the wider of "
    "DeLong's and Newcombe's 95 % intervals; shares at few false alarms (arXiv:2112.03570).",
    "Canaries: privacy auditing with one training run (arXiv:2305.08846), for all canaries, the surest half and the "
    "surest quarter, each at a third of 5 %.",
    "Secrets: exposure (arXiv:1802.08232). Copies: greedy continuation of prefixes (arXiv:2202.07646).",
)


@dataclass(frozen=True)
class Part:
    """One part of a report: a title, what was found in a sentence, and figures."""

    title: str
    finding: str
    figures: tuple[tuple[str, str], ...]


def parts(audit: Audit, versions: Mapping[str, str], when: date) -> list[Part]:
    """Put an audit into words and figures."""
    made = [_audited(audit, versions, when), _members(audit), _canaries(audit)]
    if audit.exposures[0] or audit.exposures[1]:
        made.append(_secrets(*audit.exposures))
    if audit.copies:
        made.append(_copies(*audit.copies))
    return made


def html(audit: Audit, versions: Mapping[str, str], when: date) -> str:
    """Write the report as one file of HTML that needs no other."""
    name = escape(one_line(audit.adapter))
    body = [f"<h1>Privacy audit of the adapter {name}</h1>", *_html(parts(audit, versions, when), audit)]
    body += ["<h2>What this audit cannot show</h2>", _list(CANNOT), "<h2>How it was measured</h2>", _list(HOW)]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>Privacy audit of {name}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _html(made: Sequence[Part], audit: Audit) -> Iterator[str]:
    for number, part in enumerate(made):
        yield f"<h2>{escape(part.title)}</h2>"
        if part.finding:
            yield f'<p class="finding">{escape(part.finding)}</p>'
        if number == 1:
            yield draw(curve(*audit.scores), *audit.scores)
        rows = (f"<tr><td>{escape(what)}</td><td>{escape(one_line(said))}</td></tr>" for what, said in part.figures)
        yield f"<table>{''.join(rows)}</table>"


def _list(said: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in said)}</ul>"


def _audited(audit: Audit, versions: Mapping[str, str], when: date) -> Part:
    rounds = audit.round
    rows: list[tuple[str, Any]] = [
        ("adapter", audit.adapter),
        ("SHA-256 of its weights", audit.digest),
        ("fingerprint of its base model", audit.manifest.base),
        ("task", audit.manifest.task),
        ("method", audit.manifest.peft),
        ("rounds", None if rounds is None else rounds + 1),
        ("differential privacy that its job asked for", _asked(audit.plan.privacy)),
        ("alias of the data set", audit.plan.data),
        ("date", when.isoformat()),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return Part("What was audited", "", tuple((what, str(said)) for what, said in rows if said is not None))


def _asked(privacy: PrivacySettings) -> str:
    if not privacy.asked:
        return "none"
    asked = f"ε = {privacy.epsilon:g}" if privacy.epsilon else f"noise of {privacy.noise_multiplier:g} clipping norms"
    return f"{asked}, δ = {privacy.delta:g}, of each {privacy.unit}"


def _members(audit: Audit) -> Part:
    found = audit.membership
    if found.low > 0.5:
        said = "The adapter's losses tell rows that it was trained on from rows that were held out."
    else:
        said = (
            "The adapter's losses do not tell rows that it was trained on from rows that were held out, as far as so "
            "many rows can show."
        )
    reach = f"0.5 ± {found.by_chance:.3f}; a difference smaller than that cannot be seen with so many rows"
    return Part(
        "Which rows were trained on",
        said,
        (
            ("rows to train on, measured", f"{found.members} of {audit.different} different ones"),
            ("rows held out, measured", f"{found.held_out} of {audit.held_out} different ones"),
            ("rows in both, left out", str(audit.in_both)),
            ("AUC, with its 95 % interval", f"{found.auc:.3f} ({found.low:.3f} to {found.high:.3f})"),
            ("AUC of an adapter that tells nothing, in 95 of 100 audits", reach),
            *(
                (f"training rows found at {rate:.1%} false alarms", f"{share:.1%}")
                for rate, share in found.found.items()
            ),
            ("fewest rows on either side", f"{LEAST} for any figure; 100 to tell 0.58 from 0.5, 770 to tell 0.53"),
        ),
    )


def _canaries(audit: Audit) -> Part:
    found = audit.canaries
    if found is None:
        said = "The data set holds no canaries, so nothing is said of ε. nvflare-fm site canaries plants some."
        return Part("A lower bound on ε", said, ())
    claimed = audit.plan.privacy.epsilon
    if audit.contradicts:
        said = f"The canaries contradict the ε of {claimed:g} that the job asked for: the protection did not work."
    elif claimed is not None:
        said = f"The canaries do not contradict the ε of {claimed:g} that the job asked for."
    elif found.epsilon > 0:
        said = "The job asked for no ε. The canaries show that no ε below the bound was kept."
    else:
        said = "The canaries show no leak."
    return Part(
        "A lower bound on ε",
        said,
        (
            ("canaries", f"{found.canaries}, of which {found.included} were trained on"),
            ("right guesses", f"{found.right} of {found.guesses}"),
            ("ε is at least, with 95 % confidence", f"{found.epsilon:.2f} at δ = {found.delta:g}"),
            ("the most that so many canaries can show", f"{found.ceiling:.2f}"),
        ),
    )


def _secrets(trained: Sequence[Exposure], others: Sequence[Exposure]) -> Part:
    return Part(
        "Secrets of canaries",
        f"Each true secret is ranked among {CANDIDATES} that could have stood in its place.",
        (
            ("trained on", _ranked(trained)),
            ("not trained on", _ranked(others)),
            ("of a model that has not seen them", f"rank {CANDIDATES // 2}, 1 bit in the median and 1.44 in the mean"),
        ),
    )


def _ranked(found: Sequence[Exposure]) -> str:
    if not found:
        return "none looked at"
    ranks, bits = [each.rank for each in found], [each.bits for each in found]
    return (
        f"{len(found)} secrets: rank {median(ranks):g} in the median, {min(ranks):g} at best; {median(bits):.1f} bits "
        f"in the median, {mean(bits):.2f} in the mean, {max(bits):.1f} at most"
    )


def _copies(members: Copies, held_out: Copies) -> Part:
    return Part(
        "Copies of rows",
        "What the model writes after the beginning of a row, compared with how the row goes on.",
        (
            ("beginnings", f"{len(members.longest)} of rows to train on, {len(held_out.longest)} of rows held out"),
            ("longest shared run, in tokens: rows to train on", _spread(members.longest)),
            ("longest shared run, in tokens: rows held out", _spread(held_out.longest)),
            ("longest shared run, as a part of the row's rest: rows to train on", _spread(members.overlap)),
            ("longest shared run, as a part of the row's rest: rows held out", _spread(held_out.overlap)),
            ("nearest row to train on, shared tokens: from rows to train on", _spread(members.nearest)),
            ("nearest row to train on, shared tokens: from rows held out", _spread(held_out.nearest)),
        ),
    )


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} in the mean, {max(values):.3g} at most"
