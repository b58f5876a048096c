"""A site looks at candidates beside its own rows, before it accepts them. Nothing of this leaves the site."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..errors import DataError
from ..site.data.columns import mapped
from ..site.data.rows import how_to_read, rows
from ..site.model import base_model
from ..site.offer.site_config import DataSource, SiteConfig, held_in
from ..site.tasks import BadRow
from .candidates import CandidateSet
from .embed import embed, load
from .keep import duplicates, label_margin, near_copies, nearest_distance, personal_data

_HELD_OUT = 5  # of the rows, one in so many is compared with the others
MOST = 20_000  # private rows that are compared


@dataclass(frozen=True)
class Looked:
    """What a site sees of a set.

    Args:
        distances: of each candidate to the nearest private row, in 1 − cosine.
        nearest: that row, for the site's eyes alone.
        held_out: the same distances of private rows that were held out from the others.
        reasons: place of a candidate → why this site would not add it.
    """

    distances: tuple[float, ...]
    nearest: tuple[str, ...]
    held_out: tuple[float, ...]
    reasons: dict[int, str]


def look(site: SiteConfig, candidates: CandidateSet, data: str, model: str) -> Looked:
    """Compare candidates with a site's rows.

    Args:
        data, model: aliases of the site; the model is the encoder.
    Raises:
        FmError: the site offers no such data or model, or they cannot be read.
        DataError: `no_rows`.
    """
    source = site.data_set(data)
    texts = [text for file in dict.fromkeys((source.train, source.validation)) if file for text in _texts(source, file)]
    if len(texts) < 2:
        raise DataError(f"data {data!r} has fewer than two rows with a text to compare; offer more", code="no_rows")
    mixed = Random(0).sample(texts, min(len(texts), MOST))
    held = max(1, len(mixed) // _HELD_OUT)
    encoder = load(base_model.locate(site.model(model)))
    made, private = embed(candidates.texts, encoder), embed(mixed, encoder)
    distances = nearest_distance(made, private)
    reasons = (
        label_margin(made, candidates.labels, made, candidates.labels)
        | duplicates(candidates.texts)
        | personal_data(candidates.texts)
        | near_copies(candidates.texts, texts)
    )
    return Looked(
        tuple(distances.tolist()),
        tuple(mixed[int(place)] for place in (made @ private.T).argmax(1)),
        tuple(nearest_distance(private[:held], private[held:]).tolist()),
        dict(sorted(reasons.items())),
    )


def _texts(source: DataSource, file: str) -> Iterator[str]:
    """What a reader sees of each row of a file; rows that cannot be read are left out here."""
    split = "train" if file == source.train else "validation"
    for _, row in rows(how_to_read(held_in(Path(file), source.folder), source, split)):
        if isinstance(row, BadRow):
            continue
        named = mapped(row, source)
        parts = [named.get(name) for name in ("text", "prompt", "completion")]
        if found := [part for part in parts if isinstance(part, str) and part.strip()]:
            yield "\n".join(found)
