"""One line of what a checkup finds at a site."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """For the site's own eyes: it may hold paths."""

    what: str
    good: bool
    text: str
