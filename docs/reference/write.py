"""Writes settings.md, rules.md and errors.md beside this file from the code itself: `python docs/reference/write.py`.

A test holds the files to what this would write.
"""

import ast
import collections.abc
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from inspect import getdoc, signature
from pathlib import Path
from textwrap import fill
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nvflare_fm import errors as error_classes
from nvflare_fm import transforms
from nvflare_fm.adapter import Description
from nvflare_fm.aggregation import guard, merge, step, weigh
from nvflare_fm.aggregation.asked import Needs, settings_of
from nvflare_fm.config import (
    Aggregation,
    EvaluationSettings,
    PrivacySettings,
    RoundPlan,
    RoundSettings,
    SiteOverrides,
    SyntheticSettings,
    TrainingSettings,
    VoteSettings,
)
from nvflare_fm.flare import components
from nvflare_fm.flare.locator import Measurement
from nvflare_fm.job import peft as peft_methods
from nvflare_fm.job.legality import CLASHES
from nvflare_fm.site.offer.site_config import SiteConfig

HERE = Path(__file__).parent
MADE = "<!-- Made by docs/reference/write.py from the code. Do not edit. -->\n"


def settings() -> str:
    methods = [(f"`peft` with `method = {name}`", peft_methods.registry[name]) for name in peft_methods.registry]
    groups: list[tuple[str, type[BaseModel]]] = [
        ("The plan: what the server asks of a site", RoundPlan),
        ("`training`", TrainingSettings),
        ("`evaluation`", EvaluationSettings),
        ("The plan's `privacy`", PrivacySettings),
        ("The plan's `synthetic`", SyntheticSettings),
        *methods,
        ("Aggregation: how many adapters become one", Aggregation),
        ("Rounds: arguments of `FedPEFT`", RoundSettings),
        ("A vote: arguments of `SyntheticVotes`", VoteSettings),
        ("What a job may ask of one site differently", SiteOverrides),
        ("`measurement`: how an adapter is measured", Measurement),
        ("`fm_site.yaml`: what a site offers, and its limits", SiteConfig),
        *((f"`{where}`", group) for where, group in _inside(SiteConfig)),
    ]
    intro = f"{MADE}\n# Settings\n\nA key that is not here is an error, which names the nearest key that is.\n"
    pages = [f"\n## {title}\n\n{_about(group)}\n\n{_table(group)}" for title, group in groups]
    return intro + "".join(pages) + "".join(map(_component, components.OURS))


def _component(name: str) -> str:
    """The arguments of a component that no table above has."""
    kind, module = components.load(name), import_module(name.rpartition(".")[0])
    group = getattr(module, "_Arguments", None)
    known = {*RoundSettings.model_fields, *VoteSettings.model_fields}
    own = {key: field for key, field in group.model_fields.items() if key not in known} if group else {}
    if not own:
        return ""
    defaults = {key: parameter.default for key, parameter in signature(kind).parameters.items()}
    title = f"\n## Component `{kind.__name__}`\n\n{_about(kind)}\n\n"
    return title + _rows({key: (field, defaults[key]) for key, field in own.items()})


def _about(group: type[BaseModel]) -> str:
    if issubclass(group, peft_methods.PeftMethod):
        return _wrapped(_first_line(group))
    return _wrapped((getdoc(group) or "").split("\n\n")[0].replace("\n", " "))


def _wrapped(text: str) -> str:
    return fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _inside(group: type[BaseModel], path: str = "") -> list[tuple[str, type[BaseModel]]]:
    found = []
    for name, field in group.model_fields.items():
        is_mapping = get_origin(field.annotation) is collections.abc.Mapping
        kind = get_args(field.annotation)[-1] if is_mapping else field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            where = f"{path}{name}.<alias>" if is_mapping else f"{path}{name}"
            found += [(where, kind), *_inside(kind, f"{where}.")]
    return found


def _table(group: type[BaseModel]) -> str:
    return _rows({name: (field, _default(field)) for name, field in group.model_fields.items()})


def _rows(fields: Mapping[str, tuple[FieldInfo, Any]]) -> str:
    rows = [_row(name, field, default) for name, (field, default) in fields.items()]
    return "| setting | values | default | meaning |\n|---|---|---|---|\n" + "".join(rows)


def _row(name: str, field: FieldInfo, default: Any) -> str:
    values = ", ".join([_values(field.annotation), *filter(None, map(_limit, field.metadata))])
    meaning = (field.description or "").replace("|", r"\|")
    return f"| `{name}` | {values} | {_shown(default)} | {meaning} |\n"


def _limit(constraint: Any) -> str:
    """`≥ 1` of pydantic's Ge(ge=1); nothing of what is not a limit."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = next(((sign, getattr(constraint, key)) for key, sign in signs.items() if hasattr(constraint, key)), None)
    return f"{found[0]} {found[1]:{'g' if isinstance(found[1], float) else ''}}" if found else ""


def _values(kind: Any) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _values(inside[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(_values(part) for part in inside if part is not type(None))
    if origin is tuple:
        return f"list of {_values(inside[0])}"
    if origin is collections.abc.Mapping:
        mixed = get_origin(inside[1]) in (Union, UnionType)
        return f"{_values(inside[0])} → {'what each setting takes' if mixed else _values(inside[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "settings, see below"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}.get(kind, "any")


def _default(field: FieldInfo) -> Any:
    return ... if field.is_required() else field.get_default(call_default_factory=True)


def _shown(value: Any) -> str:
    if value is ...:
        return "must be given"
    if isinstance(value, BaseModel) or value in ({}, (), "", None):
        return ""
    if isinstance(value, tuple):
        value = list(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def rules() -> str:
    lines = [MADE, "# Rules and their promises\n"]
    lines += [
        "## Merge rules\n",
        "A rule's promises choose the laws that test it, and refuse jobs that it cannot serve. A rule with settings is",
        'written `merge = {rule = "name", setting = value}`.\n',
    ]
    lines += [
        "| rule | settings | exact | mixed ranks | canonical | linear sum | rest | trains in turn | shares | follows |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in merge.registry:
        rule = merge.registry[name]
        promises = " | ".join(
            "yes" if p else "–" for p in (rule.exact, rule.mixed_ranks, rule.canonical, rule.linear_sum)
        )
        turns = ", ".join(rule.factors)
        said = f"{_of_rule(rule.merge)} | {promises} | {rule.rest} | {turns} | {rule.shares}"
        lines.append(f"| `{name}` | {said} | {_first_line(rule.merge)} |")
    lines += [
        "",
        "- **exact**: equals Σ wₖΔWₖ before it is shortened to the global rank.",
        "- **mixed ranks**: sites may train at different ranks.",
        "- **canonical**: the result is kept as U Σ Vᵀ, the strongest direction first.",
        "- **linear sum**: the server can add what sites send without reading it (`ckks`); then the rule is exact, and",
        "  sites may train at different ranks.",
        "- **rest**: the part of the global adapter that a site holds frozen beside what it trains: none, its tail",
        "  (the directions above the site's rank), or all of it (the site trains a fresh pair).",
        "- **trains**, **shares**: the factors of B @ A that are trained and that leave a site.\n",
        "## Weight factors\n",
        "A site's weight is the product of the job's factors, divided by the sum over the sites, no larger than the",
        "job's `max_weight` and the site's own. A factor with settings is written",
        '`weigh = ["examples", {rule = "loss", q = 2}]`.\n',
        *_functions(weigh.registry),
        "",
        "What a site reports of itself is held against the other sites': examples and steps count no more than ten",
        "times their median, steps no less than a tenth of it, the loss of the received adapter and the norm of what a",
        "site holds no more than three times, and no site's labels count as more evenly spread than those of every",
        "other. One of n sites that lies has at most 20 / (n + 19) of the weight by its examples, and at most 2 / n",
        "where a guard judges whole changes; `max_weight` sets another limit. **needs** is what a factor reads: a job",
        "in which it is not there is refused, and sites are asked for what they must report.\n",
        "## Guards\n",
        "What is done about a site whose change lies far from the others':",
        '`guard = ["clip_norm", {rule = "geometric_median", mix = "nnm", near = 1.3}]`. Who counts less, and why,',
        "is in the log and in `rounds.jsonl`. `clip_norm` scales what a site changed; the others lower its weight, and",
        "weights are divided by their sum afterwards. [Choose a guard](../how_to/choose_a_guard.md) compares them.\n",
        *_functions(guard.registry),
        "",
        "## Server steps\n",
        'What is done with the mean of the sites\' changes of ΔW: `step = {rule = "momentum", beta = 0.9}`.\n',
        *_functions(step.registry),
        "",
        "## Transforms\n",
        'What is done to the tensors of an adapter before they travel: `uplink = ["int8"]` for what sites send,',
        '`downlink = ["int8"]` for what the server sends. Tensors that would not get smaller travel as they are.\n',
        *_transforms(),
        "",
        "- **stage**: a sender applies transforms in the order protect, compress, encrypt.",
        "- **error**: of a number at most, in units of the largest number of its block (`int8`) or of itself (`bf16`);",
        "  of a sum, in units of its norm (`ckks`); 0: lossless.",
        "- **linear**: what several sites encode can be added up, and decodes to the sum.\n",
        "## What does not go together\n",
        "A job that asks for it is refused while it loads.\n",
        "| this | not with | because | instead |",
        "|---|---|---|---|",
        *(f"| {c.this} | {c.that} | {c.why} | {c.remedy} |" for c in CLASHES),
    ]
    return "\n".join(lines) + "\n"


def _functions(registry: Any) -> list[str]:
    lines = ["| name | settings | needs | follows |", "|---|---|---|---|"]
    for name in registry:
        needs = ", ".join(_needs(registry.needs([name])))
        lines.append(f"| `{name}` | {_of_rule(registry[name])} | {needs} | {_first_line(registry[name])} |")
    return lines


def _transforms() -> list[str]:
    lines = ["| transform | stage | error | linear | bits a number | what it is |", "|---|---|---|---|---|---|"]
    before = {"head.weight": Description((1024, 1024), torch.float32)}
    for name in transforms.registry:
        kind = transforms.registry[name]
        bits = round(8 * sum(each.bytes for each in kind().described(before).values()) / 1024**2, 1)
        linear = "yes" if kind.linear else "–"
        lines.append(f"| `{name}` | {kind.stage} | {kind.error:.2g} | {linear} | {bits:g} | {_first_line(kind)} |")
    return lines


def _of_rule(function: Any) -> str:
    fields = settings_of(function).model_fields.items()
    return "; ".join(
        f"`{key}` = {field.default}: {(field.description or '').removesuffix('.')}" for key, field in fields
    )


def _needs(needs: Needs) -> list[str]:
    said = {
        "the loss of the received adapter": needs.loss,
        "products ΔW": needs.products,
        "how late an update is": needs.lateness,
        "a canonical merge rule": needs.canonical,
        "a merge rule that adds up what sites send": needs.sums,
    }
    return [*needs.counts, *needs.labels, *(words for words, needed in said.items() if needed)]


def _first_line(function: Any) -> str:
    """Of the module the rule lives in: what it is, and whom it follows."""
    module = sys.modules[function.__module__]
    return (module.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()


def errors() -> str:
    by_code: dict[str, dict[str, None]] = {}
    for code, message in sorted(_raised(), key=lambda each: each[0]):
        by_code.setdefault(code, {})[message] = None
    for clash in CLASHES:
        message = f"{clash.this} does not go with {clash.that}: {clash.why}; {clash.remedy}"
        by_code.setdefault(clash.code, {})[message] = None
    intro = (
        f"{MADE}\n# Errors\n\n"
        "An error ends with its code in brackets, such as `[not_an_alias]`. The code stays when the wording changes.\n"
        "In the table, … stands for what a message names: a site, a tensor, a setting. A site's own log says more:\n"
        "paths, rows and values that do not leave the site. The codes of rows that cannot be used, such as\n"
        "`value_missing`, are here too.\n\n| code | what happened, and what to do |\n|---|---|\n"
    )
    return intro + "".join(f"| `{code}` | {_in_a_cell(by_code[code])} |\n" for code in sorted(by_code))


def _in_a_cell(messages: Iterable[str]) -> str:
    worded = [message for message in messages if any(map(str.isalpha, message))]
    return "<br>".join(re.sub(r"([|<*_])", r"\\\1", message) for message in worded) or "see the message"


KINDS = {
    name for name, kind in vars(error_classes).items() if isinstance(kind, type) and issubclass(kind, Exception)
} | {"Reason", "BadRow"}


def _raised() -> Iterator[tuple[str, str]]:
    """Code and message of every error in the package whose code stands beside it."""
    for file in sorted(Path(error_classes.__file__).parent.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            code = next((each.value for each in call.keywords if each.arg == "code"), None)
            message = call.args[0] if call.args else None
            if call.func.id == "Reason" and len(call.args) == 3:
                _, message, code = call.args
            if message and call.func.id in KINDS:
                for one in (code.body, code.orelse) if isinstance(code, ast.IfExp) else (code,):
                    if isinstance(one, ast.Constant):
                        yield str(one.value), _worded(message, tree)


def _worded(message: ast.expr, tree: ast.Module) -> str:
    """A message as its text in the source, … for each value that is put in."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        return "".join(_worded(part, tree) for part in message.values)
    if isinstance(message, ast.BinOp):
        return _worded(message.left, tree) + _worded(message.right, tree)
    if isinstance(message, ast.IfExp):
        return " or ".join(_worded(each, tree) for each in (message.body, message.orelse))
    if isinstance(message, ast.Name):  # the assignment before it
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and node.lineno < message.lineno]
        named = [node for node in found if ast.unparse(node.targets[0]) == message.id]
        return _worded(max(named, key=lambda node: node.lineno).value, tree) if named else "…"
    return "…"


PAGES = {"settings.md": settings, "rules.md": rules, "errors.md": errors}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
