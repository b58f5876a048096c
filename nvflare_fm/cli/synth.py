"""`nvflare-fm synth`: candidates that a model writes, variations of those that were chosen, and a look at them."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import ConfigError
from ..untrusted import one_line
from .audit import Kit, site_of
from .terminal import add_row, console

if TYPE_CHECKING:
    from ..synthesis.candidates import CandidateSet

synth = typer.Typer(no_args_is_help=True, help="Make synthetic rows from public words, and look at them.")
RequestFile = Annotated[
    Path, typer.Argument(help="YAML file with about, labels and, if you like, descriptions and examples; all public")
]
SetFile = Annotated[Path, typer.Argument(help="file of candidates, or the folder of a job's result that holds one")]
Model = Annotated[Path, typer.Option(help="folder of a causal language model; see nvflare-fm models get")]
Temperature = Annotated[float, typer.Option(min=0.1, max=2.0, help="the lower, the more alike the texts are")]
TopP = Annotated[float, typer.Option(min=0.05, max=1.0, help="share of the probability to draw a token from")]
Tokens = Annotated[int, typer.Option(min=4, max=1000, help="most tokens of a text")]
Batch = Annotated[int, typer.Option(min=1, max=1024, help="texts written together")]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="the same seed draws the same texts on the same machine")]
Output = Annotated[Path, typer.Option("--output", "-o", help="file to write; must not exist yet")]
NAMES = ("synthetic.jsonl", "candidates.jsonl")  # of a file in a folder, such as that of a job's result


@synth.command()
def generate(
    request: RequestFile,
    model: Model,
    per_label: Annotated[int, typer.Option(min=1, max=20_000, help="texts wanted of each label")] = 40,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.92,
    tokens: Tokens = 48,
    batch_size: Batch = 32,
    seed: Seed = 0,
    output: Output = Path("candidates.jsonl"),
) -> None:
    """Have a language model write candidates for labels, from public words alone.

    The model sees the request file and nothing else. Texts that are duplicates, or that have what looks like personal
    data, are left out; a label may get fewer texts than asked for.
    """
    from ..files import write_text
    from ..synthesis import generate as by
    from ..synthesis.candidates import write

    _check_output(output)
    asked = by.read_request(request)
    sampling = by.Sampling(per_label, temperature, top_p, tokens, batch_size, seed)
    by.check_size(asked, sampling)
    generator = by.load(_folder(model))
    with _shown("texts", per_label * len(asked.labels)) as tick:
        made = by.generate(generator, model.resolve().name[:64], asked, sampling, tick)
    write_text(output, write(made).decode())
    _told(made, output)


@synth.command()
def vary(
    chosen: SetFile,
    request: Annotated[Path, typer.Option(help="the request file of the set")],
    model: Model,
    per_label: Annotated[int, typer.Option(min=1, max=20_000, help="variations wanted of each label")] = 20,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.92,
    tokens: Tokens = 48,
    batch_size: Batch = 32,
    seed: Seed = 0,
    output: Output = Path("varied.jsonl"),
) -> None:
    """Have the model write more texts like the chosen ones, for another vote.

    The new set holds the chosen candidates and their variations. Votes are not copied.
    """
    from ..files import write_text
    from ..synthesis import generate as by
    from ..synthesis.candidates import write
    from ..synthesis.vary import vary as varied

    _check_output(output)
    found, asked = _read(chosen), by.read_request(request)
    generator = by.load(_folder(model))
    sampling = by.Sampling(per_label, temperature, top_p, tokens, batch_size, seed)
    with _shown("texts", per_label * len({*found.labels} - {None})) as tick:
        made = varied(generator, model.resolve().name[:64], asked, found, sampling, tick)
    write_text(output, write(made).decode())
    _told(made, output)


@synth.command()
def look(
    candidates: SetFile,
    data: Annotated[str, typer.Option(help="alias of a data set in fm_site.yaml")],
    model: Annotated[str, typer.Option(help="alias of an encoder in fm_site.yaml")] = "base",
    rows: Annotated[int, typer.Option(min=1, max=1000, help="candidates to show")] = 10,
    show_private: Annotated[
        bool, typer.Option("--show-private", help="print the nearest private row of each candidate, too")
    ] = False,
    kit: Kit = Path("."),
) -> None:
    """Look at candidates beside a site's own rows, at the site.

    The command shows some candidates with their votes, how near each one is to a private row, and why this site would
    not add it. For comparison it shows how near private rows are to each other. It prints no private row unless asked.
    """
    from random import Random

    from ..synthesis.look import look as looked_at

    found = _read(candidates)
    if not found.rows:
        raise ConfigError(
            "the set is empty: no candidate got enough votes; ask for a larger ε, or for fewer candidates",
            code="no_candidates",
        )
    seen = looked_at(site_of(kit), found, data, model)
    table = Table("label", "votes", "distance", "text", "not added because", *(["nearest private row"] * show_private))
    for place in sorted(Random(0).sample(range(len(found.rows)), min(rows, len(found.rows)))):
        row, votes = found.rows[place], found.rows[place].votes
        cells = [row.label or "", "" if votes is None else f"{votes:.1f}", f"{seen.distances[place]:.3f}", row.whole]
        add_row(table, [*cells, seen.reasons.get(place, ""), *([seen.nearest[place]] * show_private)])
    console().print(table)
    near, others = sorted(seen.distances), sorted(seen.held_out)
    typer.echo(
        f"Distance to the nearest private row: median {median(near):.3f}, least {near[0]:.3f}. Of private rows that "
        f"were held out: median {median(others):.3f}, least {others[0]:.3f}."
    )
    for reason, count in Counter(seen.reasons.values()).most_common():
        typer.echo(f"Not added: {count} of {len(found.rows)}: {reason}")


@synth.command()
def measure(
    candidates: SetFile,
    real: Annotated[Path | None, typer.Option(help="JSON lines of real rows that are no secret, with a text")] = None,
    encoder: Annotated[Path | None, typer.Option(help="folder of an encoder; needed with --real")] = None,
) -> None:
    """Measure how varied a set is and, beside real rows that are no secret, how much of them it covers."""
    from ..synthesis import keep
    from ..synthesis import measure as by

    found = _read(candidates)
    counts = Counter(found.labels)
    table = Table("measure", "value")
    add_row(table, ("candidates", len(found.rows)))
    add_row(table, ("labels", len(counts)))
    add_row(table, ("candidates of a label, at least", min(counts.values(), default=0)))
    add_row(table, ("distinct-2", f"{by.distinct_2(found.texts):.3f}"))
    add_row(table, ("duplicates", len(keep.duplicates(found.texts))))
    add_row(table, ("with what looks like personal data", len(keep.personal_data(found.texts))))
    if real:
        if encoder is None:
            raise ConfigError("--real needs --encoder, the folder of an encoder", code="no_encoder")
        from ..synthesis.embed import embed, load

        model = load(_folder(encoder))
        theirs, made = embed(_real_texts(real), model), embed(found.texts, model)
        add_row(table, ("coverage of the real rows", f"{by.coverage(theirs, made):.3f}"))
        add_row(table, ("median distance to a real row", f"{float(keep.nearest_distance(made, theirs).median()):.3f}"))
    console().print(table)


def _real_texts(file: Path) -> list[str]:
    import json

    from ..files import MIB, read_bytes

    texts = []
    try:
        for line in read_bytes(file, 64 * MIB).decode().splitlines():
            row = json.loads(line)
            texts.append(str(row.get("text") or f"{row['prompt']}\n{row['completion']}"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is no file of JSON lines with a text each; make one", str(type(error).__name__), code="real_rows"
        ) from None
    if len(texts) < 7:
        raise ConfigError(f"{file} has fewer than 7 rows; give more real rows", code="real_rows")
    return texts


def _check_output(file: Path) -> None:
    if file.exists():
        raise ConfigError(f"{file} exists already and is not overwritten; choose another", code="output_exists")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder for {file}; make it first", code="no_such_file")


def _folder(model: Path) -> Path:
    if not model.is_dir():
        raise ConfigError(f"there is no folder {model}; bring a model with nvflare-fm models get", code="no_such_file")
    return model


def _read(file: Path) -> "CandidateSet":
    from ..files import read_bytes
    from ..synthesis.candidates import LARGEST, read

    if file.is_dir():
        inside = [file / name for name in NAMES if (file / name).is_file()]
        if not inside:
            raise ConfigError(f"{file} holds no {' and no '.join(NAMES)}; name the file", code="no_such_file")
        file = inside[0]
    try:
        return read(read_bytes(file, LARGEST), file.name)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; name a file of candidates", code="candidates_unreadable") from None


def _told(made: "CandidateSet", file: Path) -> None:
    counts = Counter(made.labels)
    least = min(counts.values(), default=0)
    typer.echo(one_line(f"wrote {file}: {len(made.rows)} candidates of {len(counts)} labels, at least {least} of each"))


@contextmanager
def _shown(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of progress; what is done is told to the function that it gives."""
    from rich.progress import Progress

    with Progress(console=console(stderr=True)) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda count: progress.advance(bar, count)
