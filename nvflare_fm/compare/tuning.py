"""Each method's learning rate, and where it is asked for that of its head, found by one rule on held-out training rows.

A single rate is taken as it is. Otherwise all of a few rates first, with the head's factor at 1. Then half and double
the best, where nothing so near was tried: first of the head's factor at the best rate, then of the rate at the best
factor, until the best has neighbours on both sides in both.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import mean

from .methods import BASELINES, METHODS, Method, tuned_as
from .run import Run, Setting, carry_out_all, read_lines
from .study import Study

TUNING_SEED = 100
RATE_BOUNDS, HEAD_BOUNDS = (1e-6, 1.0), (1 / 64, 1024.0)  # further than any search went
USUAL_MORE = {False: 1, True: 7}  # trials after the first rates, without and with the head's factor: for estimates
ALPHAS = ("0", "1", "0.3", "0.1")  # of the published studies


def tuned_on(name: str) -> str:
    """The published study whose rates a published one takes: a data set is tuned at α = 0.3, for all α."""
    data, at, start = name.partition("@")
    kind, _, alpha = data.rpartition("-")
    return f"{f'{kind}-0.3' if alpha in ALPHAS else data}{at}{start}"


def tried(study: Study) -> dict[str, dict[Setting, float]]:
    """method → setting → score; of sites alone the mean over them. Lines of another configuration, such as other rows
    under the same name, do not count; training that diverged is the worst there is.
    """
    found: dict[str, dict[Setting, list[float]]] = {}
    digests: dict[tuple[str, Setting], str] = {}
    worst = math.inf if study.lower_is_better else -math.inf
    drawn = study.at_seed(TUNING_SEED)
    for row in read_lines(study.results(study.name)):
        method, setting = row["method"], (row["rate"], row.get("head", 1.0))
        if method not in METHODS and method not in BASELINES:
            continue
        if (method, setting) not in digests:
            digests[method, setting] = _trial(drawn, method, setting).digest
        if row.get("digest") == digests[method, setting]:
            scores = found.setdefault(method, {}).setdefault(setting, [])
            scores.append(worst if row["score"] is None else row["score"])
    return {method: {at: mean(scores) for at, scores in settings.items()} for method, settings in found.items()}


def _trial(drawn: Study, method: str, setting: Setting) -> Run:
    return Run(drawn, method, setting[0], TUNING_SEED, drawn.name, setting[1])


def best(scores: Mapping[Setting, float], lower_is_better: bool) -> Setting:
    """The setting with the best score, and of several the one tried first."""
    return (min if lower_is_better else max)(scores, key=lambda setting: scores[setting])


def of_method(name: str, trials: Mapping[str, Mapping[Setting, float]]) -> dict[Setting, float]:
    """What has been tried that a method may choose from."""
    both = _described(name).tunes_head
    return {setting: score for setting, score in trials.get(tuned_as(name), {}).items() if both or setting[1] == 1}


def _described(name: str) -> Method:
    return (METHODS | BASELINES)[name]


def tuned(study: Study, methods: Collection[str]) -> dict[str, Setting]:
    """The best setting of each of `methods` that has been tried; those that train as ours does take its rate."""
    if len(study.rates) == 1:
        return dict.fromkeys(methods, (study.rates[0], 1.0))
    trials = tried(study)
    found = {name: of_method(name, trials) for name in methods}
    return {name: best(scores, study.lower_is_better) for name, scores in found.items() if scores}


def beyond(scores: Mapping[Setting, float], study: Study, tunes_head: bool) -> list[list[Setting]]:
    """Half and double the best value, where nothing so near was tried: of the head's factor, then of the rate.

    A score that cannot be bettered (an accuracy of 1) has nothing beyond.
    """
    found = best(scores, study.lower_is_better)
    if scores[found] == (0.0 if study.lower_is_better else 1.0):
        return []
    rate, head = found
    heads = _outside(head, {other for at, other in scores if at == rate}) if tunes_head else []
    rates = _outside(rate, {at for at, other in scores if other == head})
    return [[(rate, value) for value in heads], [(value, head) for value in rates]]


def _outside(value: float, values: Collection[float]) -> list[float]:
    """Half and double a value, unless something was tried in between."""
    below = any(value / 2 <= other < value for other in values)
    above = any(value < other <= value * 2 for other in values)
    return [value / 2] * (not below) + [value * 2] * (not above)


def next_settings(scores: Mapping[Setting, float], study: Study, tunes_head: bool = False) -> list[Setting]:
    """What a method is still to try: all of the first rates, then what lies beyond the best, within wide bounds."""
    if len(study.rates) == 1:
        return []
    if missing := [(rate, 1.0) for rate in study.rates if (rate, 1.0) not in scores]:
        return missing
    left = ([setting for setting in side if _within(setting)] for side in beyond(scores, study, tunes_head))
    return next(filter(None, left), [])


def _within(setting: Setting) -> bool:
    return all(low <= value <= high for value, (low, high) in zip(setting, (RATE_BOUNDS, HEAD_BOUNDS), strict=True))


def at_end(study: Study, methods: Collection[str]) -> set[str]:
    """The methods whose best setting is at an end of what was tried, because it is at the bounds."""
    trials = tried(study)
    found = {name: of_method(name, trials) for name in methods}
    return {
        name for name, scores in found.items() if scores and any(beyond(scores, study, _described(name).tunes_head))
    }


def tune_all(study: Study, methods: Sequence[str], cores: int) -> None:
    """Find the setting of each method; every method tries by the same rule."""
    while runs := trials_left(study, methods):
        carry_out_all(runs, cores)


def trials_left(study: Study, methods: Sequence[str]) -> list[Run]:
    """The trials that come next."""
    drawn, trials = study.at_seed(TUNING_SEED), tried(study)
    asked = {
        (tuned_as(name), setting): None
        for name in methods
        for setting in next_settings(of_method(name, trials), study, _described(name).tunes_head)
    }
    return [_trial(drawn, method, setting) for method, setting in asked]


def unfinished(study: Study, methods: Collection[str]) -> set[str]:
    """The methods whose search is not over."""
    trials = tried(study)
    return {name for name in methods if next_settings(of_method(name, trials), study, _described(name).tunes_head)}


def trials_expected(study: Study, methods: Sequence[str]) -> int:
    """About how many trials `tune_all` will make: a search may be shorter or longer than is usual."""
    trials, wanted = tried(study), dict[str, int]()
    for name in unfinished(study, methods):
        usual = len(study.rates) + USUAL_MORE[_described(name).tunes_head] - len(of_method(name, trials))
        wanted[tuned_as(name)] = max(wanted.get(tuned_as(name), 1), usual)
    return sum(wanted.values())
