"""The cost of a job at each of its sites, from its folder and what is known of the base model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import transforms
from ...config import MANY, TaskPlan
from ...errors import ConfigError
from ...job.cost import AdapterShape, BaseShape, Cost, activation_bytes, cost, measuring_bytes, remarks
from ...privacy import clients, gaussian
from ...synthesis.tally import noise as votes_noise
from .job import ALL, Job, read_job

if TYPE_CHECKING:
    from ...privacy.forecast import Noise

EVERY = "every site"


@dataclass(frozen=True)
class Forecast:
    """What a job costs each site, and what should be known about these figures."""

    name: str
    rounds: int
    costs: list[Cost]
    notes: list[str]
    noise: "list[Noise]" = field(default_factory=list)  # of the sites whose number of records is known
    of_clients: dict[str, float] = field(default_factory=dict)  # noise at the server; empty: the job asks for none

    @property
    def title(self) -> str:
        return f"{self.name}: " + (f"{self.rounds} rounds" if self.rounds else "nothing is trained")

    def plain(self) -> dict[str, Any]:
        sites = [{**asdict(each), "memory_bytes": each.memory_bytes} for each in self.costs]
        noise = {"noise": [asdict(each) for each in self.noise]} if self.noise else {}
        clients = {"client_noise": self.of_clients} if self.of_clients else {}
        return {"name": self.name, "rounds": self.rounds, "sites": sites, "notes": self.notes, **noise, **clients}


def forecast(
    folder: Path,
    model: Path | None,
    rates: Mapping[str, float],
    measure: bool,
    memory: Mapping[str, float] | None = None,
    records: Mapping[str, float] | None = None,
) -> Forecast:
    """Tell what a job costs each of its sites.

    Args:
        folder: of the job.
        model: folder of the base model; None: bytes are known only if the job brings an adapter, memory is not.
        rates: site → seconds a step; "": every other site.
        measure: take the missing rates by training a few steps here.
        memory: site → GiB it has for training, for the rank that fits; "": every other site.
        records: site → records it trains on, for the noise of differential privacy; "": every other site.

    Raises:
        FmError: the job cannot work, or the model does not suit it.
    """
    job = read_job(folder)
    by_site = {"--seconds-per-step": rates, "--memory": memory or {}, "--records": records or {}}
    for option, given in by_site.items():
        if unknown := sorted(set(given) - {""} - set(job.sites)):
            raise ConfigError(f"{option} names {unknown[0]!r}, the job has {sorted(job.sites)}", code="unknown_site")
    if memory and model is None:
        raise ConfigError("--memory needs the base model's layers: say where it is with --model", code="no_model")
    if measure and model is None:
        raise ConfigError("--measure trains the base model: say where it is with --model", code="no_model")
    noise = _noise(job, model, records or {})
    costs = [_cost(job, site, model, rates, measure, memory or {}) for site in sorted(job.sites)]
    of_clients = _of_clients(job)
    notes = [*_notes(job, costs, model, measure), *_of_noise(job, noise), *_of_client_noise(of_clients)]
    return Forecast(job.name, len(job.rounds), costs, notes, noise, of_clients)


def _cost(
    job: Job, site: str, model: Path | None, rates: Mapping[str, float], measure: bool, memory: Mapping[str, float]
) -> Cost:
    plan = job.sites[site].overrides.applied(job.plan)
    base, adapter = _shapes(job, site, model)
    rate = rates.get(site, rates.get(""))
    if rate is None and measure and model:
        from ...site.check.rehearsal import seconds_per_step

        rate = seconds_per_step(model, plan)
    has = memory.get(site, memory.get(""))
    ranks = [each.overrides.applied(job.plan).rank for each in job.sites.values()]
    return cost(
        EVERY if site == ALL else site,
        plan,
        processes=job.sites[site].processes,
        widest=job.settled.merged_rank(ranks) if job.settled else job.plan.rank,
        starts_at=_starts_at(job),
        adapter=adapter,
        base=base,
        seconds_per_step=rate,
        memory_bytes=None if has is None else has * 2**30,
        trains=bool(job.rounds),
    )


def _noise(job: Job, model: Path | None, records: Mapping[str, float]) -> "list[Noise]":
    """The noise of each site whose number of records is given, where the job asks for privacy.

    Raises:
        ConfigError: the job does not, or the number is not whole.
    """
    if not records:
        return []
    if not (job.plan.privacy.asked and job.rounds):
        raise ConfigError("--records is for jobs that set privacy and train; leave it out", code="no_privacy")
    from ...privacy.forecast import noise

    found = []
    for site in sorted(job.sites):
        given = records.get(site, records.get(""))
        if given is None:
            continue
        if given != int(given) or given > MANY:
            raise ConfigError(f"--records takes whole numbers up to {MANY}", code="no_number")
        plan, (_, adapter) = job.sites[site].overrides.applied(job.plan), _shapes(job, site, model)
        numbers = adapter.trained(plan.rank, plan.factors) if adapter else None
        name, processes = EVERY if site == ALL else site, job.sites[site].processes
        found.append(noise(name, plan, int(given), job.rounds.stop, processes, numbers))
    return found


def _of_noise(job: Job, noise: "list[Noise]") -> list[str]:
    if not (job.plan.privacy.asked and job.rounds):
        return []
    if not noise:
        return ["to see the noise of differential privacy, add --records N, or SITE=N: the records a site trains on"]
    notes = [
        "noise : clip is the length of a step's noise over the longest that a step's mean gradient can be; larger "
        "batches, fewer steps, a lower rank and more records lower it",
    ]
    if any(each.ratio is None for each in noise):
        notes.append("noise : clip is not known without the base model's layers: add --model FOLDER")
    return notes


def _of_clients(job: Job) -> dict[str, float]:
    """The noise on the mean change of each round, and what all rounds cost a site."""
    if not (job.settled and job.adapter and job.settled.aggregation.client_privacy.asked):
        return {}
    noise = clients.checked(job.settled.aggregation.client_privacy, job.rounds.stop, job.adapter)
    numbers = clients.noised_numbers(job.adapter)
    return {
        "noise_multiplier": noise.noise_multiplier,
        "max_norm": noise.max_norm,
        "expected_sites": noise.expected_sites,
        "rounds": noise.rounds,
        "epsilon": noise.epsilon(noise.rounds),
        "delta": noise.delta,
        "numbers": numbers,
        "ratio": noise.ratio(numbers),
        "ratio_of_all": noise.ratio_of_all(numbers),
        "per_number": noise.per_number,
    }


def _of_client_noise(noise: Mapping[str, float]) -> list[str]:
    if not noise:
        return []
    notes = [
        "client privacy: noise : clip is the length of a round's noise over the longest that the mean change can be; "
        "per number is the noise of all rounds on one number, over the farthest that they can move the adapter"
    ]
    if noise["per_number"] > clients.FELT:
        notes.append(
            f"client privacy: from {clients.FELT:g} per number on, noise costs a good part of what can be learned "
            "(docs/privacy.md); more sites or a larger epsilon lower it"
        )
    return notes


def _starts_at(job: Job) -> int:
    """Bytes of the adapter that the job brings, as it goes to each site; to be measured only, it travels as it is."""
    chain = transforms.read(job.plan.downlink if job.rounds else (), "downlink")
    found = job.adapter.descriptions() if job.adapter else {}
    if job.adapter and job.adapter.sealed:
        return job.adapter.bytes_sent()
    return sum(chain.encoded(name, tensor).bytes for name, tensor in found.items())


def _of_votes(plan: TaskPlan) -> str:
    """What a vote costs, and how many votes drown in its noise."""
    privacy, sigma = plan.privacy, votes_noise(plan.privacy)
    epsilon = privacy.epsilon or gaussian.epsilon(sigma, 1, privacy.delta)
    return (
        f"{plan.votes} candidates come with the job, and each site sends one number for each, once; a record has one "
        f"vote. Noise of about {sigma:.2g} votes on each number costs it ε = {epsilon:.3g} at δ = {privacy.delta:g}"
    )


def _shapes(job: Job, site: str, model: Path | None) -> tuple[BaseShape | None, AdapterShape | None]:
    if model:
        from ...site.model.shapes import shapes

        return shapes(model, job.sites[site].overrides.applied(job.plan))
    if job.adapter:
        sizes = {layer: job.adapter.lora[layer].shape for layer in job.adapter.lora}
        found = job.adapter.descriptions()
        return None, AdapterShape(sizes, tuple(prod(found[name].shape) for name in job.adapter.dense))
    return None, None


def _notes(job: Job, costs: list[Cost], model: Path | None, measured: bool) -> list[str]:
    notes = []
    if model is None:
        lacking = "memory is" if job.adapter else "memory and bytes are"
        notes.append(f"{lacking} not known without the base model's layers: add --model FOLDER (config.json is enough)")
    else:
        notes.append(
            "memory is an estimate for texts of max_length, of one process, besides what Python and its libraries take "
            "(about 0.9 GB on a CPU; the driver's share on a GPU); on a CPU a step takes up to half as much again"
        )
        if job.plan.compute_dtype == "auto":
            notes.append(
                "compute_dtype auto is counted as bf16 under quantization; most CPUs compute in fp32, for more"
            )
        for site in sorted(job.sites):
            base, adapter = _shapes(job, site, model)
            plan = job.sites[site].overrides.applied(job.plan)
            said = remarks(base, plan) if base else []
            if base and adapter and measuring_bytes(base, plan) > activation_bytes(base, adapter, plan):
                said.append("to measure a batch takes more memory than a training step; lower evaluation.batch_size")
            notes += [note for note in said if note not in notes]
    if job.plan.votes:
        return [*notes, _of_votes(job.plan)]
    if not job.rounds:
        return [*notes, "the adapter goes to each site once, and metrics come back; nothing is trained"]
    first = costs[0].bytes_down_first
    notes.append(f"in the first round {f'{first} bytes' if first else 'no adapter'} goes down to each site")
    if job.plan.head_start == "features":
        notes.append(
            "before the first round sites that tell of their features send sums over them (head_start): 4 bytes for "
            "each of (labels + features) × features numbers, where features is the model's hidden size"
        )
    if any(each.steps is None for each in costs):
        notes.append("local_steps is 0: the steps of a round follow from local_epochs and each site's rows")
    elif any(each.seconds is None for each in costs):
        notes.append(
            "seconds are not known: add --seconds-per-step with what `nvflare-fm site check` tells at the sites, or "
            "--measure to try the model on this machine"
        )
    else:
        where = "on this machine, as measured" if measured else "at the rate given"
        notes.append(f"seconds are those of training {where}; loading, evaluation and messages come on top")
    return notes
