"""Filters: why a candidate is not used. Each gives the reason for each place that it takes out, and no others.

A site applies them to what others offer it, against its own rows. Near copies are its own guard: whoever wrote the
candidates, whatever was paid for the votes, and whatever the job says, no text close to a private one is trained on.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import normalize

Reasons = dict[int, str]
RUN = 8  # words one after the other that no two people write by chance
ALIKE = 0.8  # of the different words of two texts
_AT_ONCE = 1024  # points
_WORD = re.compile(r"\w+")
_PERSONAL = {
    "an e-mail address": r"(?<![\w.+-])[\w.+-]{1,64}@[\w.-]{1,255}\.\w{2,}",
    "a web address": r"(?:https?://|www\.)\S+",
    "a telephone number": r"(?<![\w.])(?:\+|00|\()?\d{1,4}[)\s./-]{1,2}\d{2,4}(?:[\s./-]\d{2,4})+(?![\w.])",
    "a long number": r"(?<!\w)\d(?:[ -]?\d){7,}(?!\w)",
    "an account number": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b",
    "a network address": r"\b(?:\d{1,3}\.){3}\d{1,3}\b",
    "a day": r"\b(?:\d{1,2}[./-]\d{1,2}[./-](?:19|20)?\d{2}|(?:19|20)\d{2}-\d{2}-\d{2})\b",
    "a name with a title": r"\b(?:Mr|Mrs|Ms|Dr|Prof)\.? [A-Z][a-z]+",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _PERSONAL.items()}


def words(text: str) -> list[str]:
    """The words of a text, whatever their case, their accents' encoding and what stands between them."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def duplicates(texts: Sequence[str]) -> Reasons:
    """Texts whose words are those of one before."""
    seen, found = set[tuple[str, ...]](), Reasons()
    for place, text in enumerate(texts):
        said = tuple(words(text))
        if said in seen:
            found[place] = "a duplicate"
        seen.add(said)
    return found


def personal_data(texts: Sequence[str]) -> Reasons:
    """Texts with what looks like personal data; what a model makes up may be somebody's all the same."""
    found = Reasons()
    for place, text in enumerate(texts):
        kinds = [kind for kind, pattern in _PATTERNS.items() if pattern.search(text)]
        if kinds:
            found[place] = f"it has what looks like {kinds[0]}"
    return found


def near_copies(texts: Sequence[str], private: Iterable[str], run: int = RUN, alike: float = ALIKE) -> Reasons:
    """Texts that share `run` words one after the other with a private text, or most of their different words.

    Args:
        texts: of the candidates.
        private: texts of the site; they are read once.
        run: words.
        alike: words that both have, as a part of those that either has (Jaccard), from which on one is a copy.
    """
    said = [words(text) for text in texts]
    runs: dict[tuple[str, ...], list[int]] = {}
    for place, each in enumerate(said):
        for some in _runs(each, run):
            runs.setdefault(some, []).append(place)
    often = Counter(word for each in said for word in set(each))
    different = [set(each) for each in said]
    rarest: dict[str, list[int]] = {}  # by each of a text's rarest words, one of which a text alike must share
    for place, vocabulary in enumerate(different):
        for word in _rarest(vocabulary, often, alike):
            rarest.setdefault(word, []).append(place)
    found = Reasons()
    for text in private:
        theirs = words(text)
        for some in _runs(theirs, run):
            found.update(dict.fromkeys(runs.get(some, ()), f"it shares {run} words in a row with a private row"))
        own = set(theirs)
        for place in {place for word in _rarest(own, often, alike) for place in rarest.get(word, ())}:
            fewer, more = sorted((len(own), len(different[place])))
            if fewer >= alike * more and len(own & different[place]) >= alike * len(own | different[place]):
                found.setdefault(place, "it has nearly the words of a private row")
    return dict(sorted(found.items()))


def _runs(said: list[str], run: int) -> set[tuple[str, ...]]:
    return {tuple(said[start : start + run]) for start in range(len(said) - run + 1)}


def _rarest(said: set[str], often: Counter[str], alike: float) -> list[str]:
    """The words of which two texts that are alike share at least one: all but ⌈alike · n⌉ − 1, the rarest first. After
    Bayardo, Ma and Srikant (WWW 2007).
    """
    return sorted(said, key=lambda word: (often[word], word))[: len(said) - ceil(alike * len(said)) + 1]


def too_near(candidates: Tensor, private: Tensor, least: float) -> Reasons:
    """Candidates whose embedding lies nearer to a private row's than `least`, in 1 − cosine.

    Args:
        candidates: unit vectors.
        private: unit vectors.
    """
    distances = nearest_distance(candidates, private)
    return dict.fromkeys((distances < least).nonzero()[:, 0].tolist(), "its meaning is too near to a private row's")


def nearest_distance(points: Tensor, others: Tensor) -> Tensor:
    """From each point to the nearest of the others, in 1 − cosine; infinite where there are none."""
    if not len(others):
        return torch.full((len(points),), torch.inf)
    parts = [1 - (some @ others.T).amax(1) for some in torch.split(points, _AT_ONCE)]
    return torch.cat(parts).clamp(min=0) if parts else torch.zeros(0)


def label_margin(
    candidates: Tensor,
    labels: Sequence[str | None],
    anchors: Tensor,
    anchor_labels: Sequence[str | None],
    least: float = 0.0,
) -> Reasons:
    """Candidates that are more like another label than like their own.

    The margin is a candidate's cosine with the mean of its own label's anchors, less the largest with another label's.

    Args:
        candidates: unit vectors.
        anchors: unit vectors whose labels are known: a site's own rows, or other candidates. A candidate whose label
            has no anchors is not judged.
        least: margin that is enough.
    """
    known = sorted({label for label in anchor_labels if label is not None})
    judged = [place for place, label in enumerate(labels) if label in known]
    if len(known) < 2 or not judged:
        return {}
    places = {label: number for number, label in enumerate(known)}
    means = torch.zeros(len(known), anchors.shape[1], dtype=anchors.dtype)
    named = [(row, places[label]) for row, label in enumerate(anchor_labels) if label is not None]
    means.index_add_(0, torch.tensor([number for _, number in named]), anchors[[row for row, _ in named]])
    cosines = candidates[judged] @ normalize(means, dim=1).T
    own = torch.tensor([places[str(labels[place])] for place in judged])
    mine = cosines.gather(1, own[:, None])[:, 0]
    others = cosines.scatter(1, own[:, None], -torch.inf).amax(1)
    return {
        place: "it is more like another label"
        for place, margin in zip(judged, (mine - others).tolist(), strict=True)
        if margin < least
    }
