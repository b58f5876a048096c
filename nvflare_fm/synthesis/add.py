"""Which of the chosen candidates a site adds to its training rows: those of the classes that it has fewest rows of.

What is added depends on how many rows of each class the site has. So it is no part of a job under DP-SGD: there, one
private row more or less may change no more than its own gradient.
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from fractions import Fraction


def add(
    own_label_counts: Mapping[str, int], candidate_labels: Sequence[str | None], share: float, turn: int = 0
) -> list[int]:
    """Decide which candidates a site adds.

    One is added at a time, to the class that has the fewest rows by then, until the share is reached.

    Args:
        own_label_counts: the site's own training rows of each class; those without a class under any name.
        candidate_labels: of the candidates, the best first.
        share: of all training rows, own and added, that may be added ones; 0 to below 1.
        turn: where in the candidates of each class to begin, so that sites that need few of a class add different ones;
            a number that the site draws once, such as a digest of its name.
    Returns:
        Places of the candidates, in ascending order.
    """
    part = Fraction(share)
    most = int(part * sum(own_label_counts.values()) / (1 - part))
    waiting: dict[str | None, deque[int]] = {}
    for place, label in enumerate(candidate_labels):
        waiting.setdefault(label, deque()).append(place)
    for places in waiting.values():
        places.rotate(-(turn % len(places)))
    rows = {label: own_label_counts.get(label, 0) if label is not None else 0 for label in waiting}
    fewest = [(count, label or "", label) for label, count in rows.items()]
    heapq.heapify(fewest)
    added: list[int] = []
    while fewest and len(added) < most:
        count, name, label = heapq.heappop(fewest)
        added.append(waiting[label].popleft())
        if waiting[label]:
            heapq.heappush(fewest, (count + 1, name, label))
    return sorted(added)
