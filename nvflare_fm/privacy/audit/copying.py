"""How much of a text a language model copies: the longest run of tokens that what it writes shares with the text.

Carlini et al., "Quantifying memorization across neural language models" (arXiv:2202.07646), look at greedy
continuations of prefixes of training rows. A run is more telling than the share of equal tokens: common words are equal
everywhere.
"""

from collections.abc import Sequence

import numpy as np

_END = -1  # between two texts; no token


def longest_run(written: Sequence[int], texts: Sequence[Sequence[int]]) -> int:
    """Count the tokens of the longest run that `written` shares with any of the texts, wherever it stands there."""
    corpus = np.array([token for text in texts for token in (*text, _END)], dtype=np.int64)
    runs, longest = np.zeros(len(corpus) + 1, dtype=np.int64), 0
    for token in written:
        runs[1:] = np.where(corpus == token, runs[:-1] + 1, 0)  # of runs that end with this token, by their end
        longest = max(longest, int(runs.max()))
    return longest
