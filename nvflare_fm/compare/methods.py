"""What is compared: the default configuration, its parts one by one, and faithful versions of what others do.

Every peer trains at ours' scales, but for the scale-blind one, which is defined by one α at every rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import Aggregation, Quantization
from ..errors import ConfigError
from ..job.tasks import promises
from ..registry import nearest
from ..site.worker import Worker
from . import peers

OURS, AT_HOME = "ours", "ours, finished at home"
ITS_OWN = "ours, and its own at home"
TOGETHER = "pooled, trained as ours"
ALONE = "alone, at home"  # what each site's own model has on its own rows


@dataclass(frozen=True)
class Method:
    """A method of the comparison: how adapters become one, and what its sites do differently.

    Args:
        aggregation: merge rule, weights, guards and server step.
        rank: of all sites; 0: mixed.
        alpha: rank of a site → its α, for a scale of α / rank; None: one α and a scale of α / √rank (rsLoRA).
        worker: what a site does; a peer's may differ.
        folds: whether adapters are added to the base model each round.
        quantizations: of the base model, over the sites in turn.
        peft: the PEFT method and its settings; empty: LoRA at `rank`.
        training: training settings that differ from the defaults.
        privacy: differential privacy of what each site sends; empty: none.
        head_start: first values of the head.
        at_home: share of the rounds, the last ones, in which each site trains by itself, for itself.
        personal: steps that each site trains on for itself after the last round, in multiples of those of all rounds.
        slow: rounds that every third site takes for one.
        waits: whether rounds wait for the slow sites, so that fewer fit into the same time.
        codec: transforms of what travels, both ways.
        at_our_bytes: whether all sites train at the one rank at which as many bytes travel as in ours.
        tunes_head: whether the head's learning rate is sought too.
        head_factor: times the head's learning rate.
    """

    aggregation: Aggregation = field(default_factory=Aggregation)
    rank: int = 0
    alpha: Callable[[int], float] | None = None
    worker: type[Worker] = Worker
    folds: bool = False
    quantizations: tuple[Quantization, ...] = ("nf4",)
    peft: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)
    head_start: str = "random"
    at_home: float = 0.0
    personal: float = 0.0
    slow: int = 1
    waits: bool = False
    codec: tuple[str, ...] = ()
    at_our_bytes: bool = False
    tunes_head: bool = False
    head_factor: float = 1.0


PLAIN: dict[str, Any] = {"head_lr_ratio": 0.0}


def peer(merge: str, *weigh: str, **more: Any) -> Method:
    """Describe a method of others, whose sites train as usual."""
    aggregation = Aggregation(merge=merge, weigh=weigh or ("examples",), step="plain", guard=())
    return Method(aggregation, training=PLAIN, **more)


PEERS = {
    "FedIT, rank 4": peer("factor_mean", rank=4),
    "FedIT, zero-padded": peer("zero_pad"),
    "HetLoRA": peer("zero_pad", "norm", worker=peers.SelfPruningWorker),
    "FlexLoRA": peer("svd"),
    "HLoRA, scale-blind": peer("svd", alpha=lambda rank: 16.0, worker=peers.ScaleBlindWorker),
    "FFA-LoRA, rank 4": peer("freeze_a", rank=4),
    "RoLoRA, rank 4": peer("alternate", rank=4),
    "FedSA-LoRA, rank 4": peer("share_a", rank=4),
    "raFLoRA": peer("rank_partition"),
    "FLoRA, folded into NF4": peer("stack", folds=True),
}
OWN_RATE = {  # a part of ours, and a peer whose sites train as ours do, each at a rate of its own
    "ours, the rule alone": Method(Aggregation(weigh=("examples",), step="plain"), training=PLAIN),
    "FedIT, rank 4, trained as ours": Method(Aggregation(merge="factor_mean"), rank=4),
}
OUR_HEAD, HEAD_RATE = "our head", "own head rate"


def with_our_head(method: Method) -> Method:
    """A method whose sites train the head as ours do."""
    return replace(method, training={k: v for k, v in method.training.items() if k != "head_lr_ratio"})


WITH_OUR_HEAD = {f"{name}, {OUR_HEAD}": with_our_head(method) for name, method in PEERS.items()}
WITH_HEAD_RATE = {
    f"{name}, {HEAD_RATE}": replace(method, tunes_head=True)
    for name, method in {OURS: Method(), **PEERS}.items()
}  # fmt: skip
AT_BYTES_OF_OURS = {  # FedIT at more bytes than it has as published
    "FedIT, bytes of ours": peer("factor_mean", at_our_bytes=True),
    f"FedIT, bytes of ours, {OUR_HEAD}": with_our_head(peer("factor_mean", at_our_bytes=True)),
    "FedIT, bytes of ours, trained as ours": Method(Aggregation(merge="factor_mean"), at_our_bytes=True),
}
FEWER_BYTES = {  # ours at those of FedIT and below; at the rates of ours
    "ours, int8": Method(codec=("int8",)),
    "ours, rank 4": Method(rank=4),
    "ours, rank 4, int8": Method(rank=4, codec=("int8",)),
}
FROM_FEATURES = "ours, head from features"
PARTS = {
    "ours, by examples": Method(Aggregation(weigh=("examples",))),
    "ours, plain steps": Method(Aggregation(step="plain")),
    "ours, FedExP's steps": Method(Aggregation(step="fedexp")),
}
PRECISIONS = {
    "ours, all fp32": Method(quantizations=("fp32",)),
    "ours, NF4 + int8 + fp32": Method(quantizations=("nf4", "int8", "fp32")),
}
SLOW = {  # three of ten sites need three rounds for one
    "slow sites waited for": Method(slow=3, waits=True),
    "slow sites called off": Method(slow=3),
    "slow sites late": Method(Aggregation(max_staleness=2), slow=3),
    "slow sites late, by age": Method(Aggregation(max_staleness=2, weigh=("uniform", "staleness")), slow=3),
}
EPSILONS = (8.0, 3.0, 1.0)
MOST_ROWS = {"local_steps": 1, "batch_size": 64, "gradient_accumulation_steps": 8}  # few steps of many rows: less noise
FAR = {"head_lr_ratio": 24.0}  # a head goes as far in those as in the many steps of others


def private(epsilon: float, method: Method) -> Method:
    """Have a method's sites train by DP-SGD, at an ε of the whole federation."""
    return replace(method, privacy={"epsilon": epsilon}, training={**FAR, **method.training, **MOST_ROWS})


HEAD_ALONE = Method(  # best on a good base model: of studies whose names end in @full
    peft={"method": "head"}, training={"head_lr_ratio": None, "batch_size": 64}
)
AT_EPSILON = {  # peers' weights by examples would tell how many rows a site has
    f"{name}, ε = {epsilon:g}": private(epsilon, method)
    for epsilon in EPSILONS
    for name, method in {
        OURS: Method(),
        "ours, head alone": HEAD_ALONE,
        "ours, A frozen, rank 4": Method(Aggregation(merge="freeze_a"), rank=4),
        "FFA-LoRA, rank 4": Method(Aggregation(merge="freeze_a", step="plain", guard=()), training=PLAIN, rank=4),
    }.items()
}
METHODS = {
    OURS: Method(), "ours, head alone": HEAD_ALONE,
    **PEERS, AT_HOME: Method(at_home=0.5), ITS_OWN: Method(personal=1.0),
    **OWN_RATE, FROM_FEATURES: Method(head_start="features"), **PARTS, **PRECISIONS, **SLOW, **AT_EPSILON,
    **WITH_OUR_HEAD, **WITH_HEAD_RATE, **AT_BYTES_OF_OURS, **FEWER_BYTES,
}  # fmt: skip
BASELINES = {
    "pooled": Method(training=PLAIN),
    f"pooled, {HEAD_RATE}": Method(training=PLAIN, tunes_head=True),
    "alone": Method(),
    TOGETHER: Method(),
    "alone, head alone": HEAD_ALONE,
    **{f"alone, ε = {epsilon:g}": private(epsilon, Method()) for epsilon in EPSILONS},
    **{f"alone, head alone, ε = {epsilon:g}": private(epsilon, HEAD_ALONE) for epsilon in EPSILONS},
}
COMPARED = [OURS, *PEERS, "pooled", "alone"]
AS_OURS = [AT_HOME, ITS_OWN, *PARTS, *PRECISIONS, *SLOW, *FEWER_BYTES]  # at the rate of ours
FAIR = {  # whether text is written → what is compared besides, so that neither the head nor the bytes decide
    False: [*WITH_OUR_HEAD, *WITH_HEAD_RATE, f"pooled, {HEAD_RATE}", *AT_BYTES_OF_OURS],
    True: [name for name in AT_BYTES_OF_OURS if OUR_HEAD not in name],
}


def compared(task: str) -> list[str]:
    """The methods that the docs compare on a task."""
    starts = [] if promises(task).learns_text else [FROM_FEATURES]
    return [*COMPARED, *starts, "FedIT, rank 4, trained as ours", *FAIR[promises(task).learns_text], *FEWER_BYTES]


def tuned_as(method: str) -> str:
    """The method that a method's trials are trials of: one with a rate of its own for the head is no other method."""
    return OURS if method in AS_OURS else method.removesuffix(f", {HEAD_RATE}")


def is_lone(method: str) -> bool:
    """Whether each site trains a model by itself."""
    return method.startswith("alone")


def methods_named(names: Sequence[str]) -> list[str]:
    """Check the names of methods and baselines.

    Raises:
        ConfigError: `unknown_name`.
    """
    known = [*METHODS, *BASELINES]
    if unknown := sorted({*names} - {*known}):
        raise ConfigError(
            f"no method {unknown[0]!r}; {nearest(unknown[0], known)}known: {'; '.join(known)}", code="unknown_name"
        )
    return [*names]
