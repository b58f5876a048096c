"""Pictures of an audit as SVG, drawn without a library: a site needs none for its report."""

from collections.abc import Iterable, Sequence

from ...privacy.audit.membership import Curve

_WIDTH, _HEIGHT, _LEFT, _TOP = 260, 220, 44, 26
_MEMBERS, _HELD_OUT, _INK, _GRID = "#D55E00", "#0072B2", "#222222", "#bbbbbb"  # after Okabe and Ito
_BARS = 24
Points = Sequence[tuple[float, float]]  # in parts of the panel: (0, 0) is at the bottom left


def draw(curve: Curve, members: Sequence[float], held_out: Sequence[float]) -> str:
    """Draw the receiver operating characteristic beside the distributions of both sides' scores."""
    low, high = _middle([*members, *held_out])
    heights = [_shares(scores, low, high) for scores in (members, held_out)]
    tallest = max(max(shares) for shares in heights)
    steps = [[(x, height / tallest) for x, height in _steps(shares)] for shares in heights]
    roc = [_line([(0, 0), (1, 1)], _GRID, "4 3"), _line(curve, _MEMBERS)]
    scores = [_line(steps[0], _MEMBERS), _line(steps[1], _HELD_OUT)]
    legend = f'<tspan fill="{_MEMBERS}">trained on</tspan>, <tspan fill="{_HELD_OUT}">held out</tspan>'
    panels = [
        _panel(0, "Training rows found", roc, "held-out rows taken for them", ("0", "1"), ("0", "1")),
        _panel(1, f"Scores: {legend}", scores, "loss without − with the adapter", (f"{low:.2g}", f"{high:.2g}"), ()),
    ]
    width, height = 2 * (_WIDTH + _LEFT + 20), _HEIGHT + _TOP + 44
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-size="12" '
        f'font-family="sans-serif" fill="{_INK}" role="img" aria-label="Curve and scores of the membership test">'
        f"{''.join(panels)}</svg>"
    )


def _panel(place: int, title: str, lines: Iterable[str], below: str, x: Sequence[str], y: Sequence[str]) -> str:
    texts = [f'<text x="0" y="-10" font-weight="bold">{title}</text>']
    texts += [f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 34}" text-anchor="middle">{below}</text>']
    texts += [
        f'<text x="{at * _WIDTH}" y="{_HEIGHT + 16}" text-anchor="{anchor}">{tick}</text>'
        for at, (tick, anchor) in enumerate(zip(x, ("start", "end"), strict=True))
    ]
    texts += [
        f'<text x="-6" y="{_HEIGHT - at * (_HEIGHT - 10)}" text-anchor="end">{tick}</text>' for at, tick in enumerate(y)
    ]
    axes = f'<path d="M0 0V{_HEIGHT}H{_WIDTH}" fill="none" stroke="{_INK}"/>'
    left = place * (_WIDTH + _LEFT + 20) + _LEFT
    return f'<g transform="translate({left} {_TOP})">{axes}{"".join(lines)}{"".join(texts)}</g>'


def _line(points: Points, colour: str, dashes: str = "") -> str:
    path = " ".join(f"{x * _WIDTH:.1f},{(1 - y) * _HEIGHT:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>'


def _middle(scores: Sequence[float]) -> tuple[float, float]:
    """Where all scores but the outermost hundredths lie."""
    ranked = sorted(scores)
    cut = len(ranked) // 100
    low, high = ranked[cut], ranked[-1 - cut]
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _shares(scores: Sequence[float], low: float, high: float) -> list[float]:
    counts = [0] * _BARS
    for score in scores:
        place = int((score - low) / (high - low) * _BARS)
        counts[min(max(place, 0), _BARS - 1)] += 1
    return [count / len(scores) for count in counts]


def _steps(shares: Sequence[float]) -> list[tuple[float, float]]:
    inner = [(x / _BARS, height) for bar, height in enumerate(shares) for x in (bar, bar + 1)]
    return [(0.0, 0.0), *inner, (1.0, 0.0)]
