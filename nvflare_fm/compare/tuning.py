"""Each method's learning rate, found by one rule on held-out training rows: a few rates, then half or double."""

from collections.abc import Mapping, Sequence
from statistics import mean

from .methods import AS_OURS, OURS
from .run import Run, carry_out_all, read_lines
from .study import Study

MOST_RATES, TUNING_SEED = 5, 100
ALPHAS = ("0", "1", "0.3", "0.1")  # of the published studies


def tuned_on(name: str) -> str:
    """The published study whose rates a published one takes: a data set is tuned at α = 0.3, for all α."""
    data, at, start = name.partition("@")
    kind, _, alpha = data.rpartition("-")
    return f"{f'{kind}-0.3' if alpha in ALPHAS else data}{at}{start}"


def tried(study: Study, tuning_of: str) -> dict[str, dict[float, float]]:
    """method → rate → score; of sites alone the mean over them."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in read_lines(study.results(tuning_of)):
        found.setdefault(row["method"], {}).setdefault(row["rate"], []).append(row["score"])
    return {method: {rate: mean(scores) for rate, scores in rates.items()} for method, rates in found.items()}


def best(scores: Mapping[float, float], lower_is_better: bool) -> float:
    """The rate with the best score."""
    return (min if lower_is_better else max)(scores, key=lambda rate: scores[rate])


def tuned(study: Study, tuning_of: str) -> dict[str, float]:
    """The best rate of each method that has been tried; methods that train as ours does take its rate."""
    rates = {method: best(scores, study.lower_is_better) for method, scores in tried(study, tuning_of).items()}
    return rates | (dict.fromkeys(AS_OURS, rates[OURS]) if OURS in rates else {})


def next_rates(scores: Mapping[float, float], study: Study) -> list[float]:
    """What a method is still to try: all of the first rates, then half or double the best while it is at an end.

    A score that cannot be bettered (an accuracy of 1) ends the search.
    """
    if missing := [rate for rate in study.rates if rate not in scores]:
        return missing
    found = best(scores, study.lower_is_better)
    beyond = found / 2 if found == min(scores) else found * 2
    ceiling = 0.0 if study.lower_is_better else 1.0
    return [] if scores[found] == ceiling or len(scores) >= MOST_RATES or beyond in scores else [beyond]


def tune_all(study: Study, tuning_of: str, methods: Sequence[str], cores: int) -> None:
    """Find the rate of each method; every method tries by the same rule."""
    while runs := [
        Run(study, method, rate, TUNING_SEED, tuning_of)
        for method in dict.fromkeys(OURS if method in AS_OURS else method for method in methods)
        for rate in next_rates(tried(study, tuning_of).get(method, {}), study)
    ]:
        carry_out_all(runs, cores)
