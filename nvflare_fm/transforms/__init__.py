"""Transforms: what is done to an adapter's tensors before they travel, and undone where they arrive. One file each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..adapter import Description
from ..config import Rule, Settings
from ..errors import ConfigError
from ..registry import Registry

Stage = Literal["protect", "compress", "encrypt"]  # in the order in which a sender must apply them
Kept = Mapping[str, Tensor]  # what a site keeps for one transform from round to round, by tensor


@dataclass(frozen=True)
class Parcel:
    """An adapter's tensors on their way, as the transforms so far have left them.

    A mapping that makes its tensors when they are read keeps one of them in memory at a time.
    """

    sender: str  # for errors
    tensors: Mapping[str, Tensor]  # by PEFT name
    described: Mapping[str, Description]  # of the same

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return sum(each.bytes for each in self.described.values())


@dataclass(frozen=True)
class Event:
    """What one transform did to one parcel, for the records of both ends."""

    transform: str
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return f"{self.transform}: {self.bytes_before} → {self.bytes_after} bytes"


class Transform(Settings):
    """One transform, its promises, and its settings as fields.

    The promises choose the laws that test it, and refuse chains that cannot work.
    """

    stage: ClassVar[Stage]
    error: ClassVar[float]  # of a number at most, in units of the largest number of its tensor; 0: lossless
    linear: ClassVar[bool] = False  # the sum of what several sites encode decodes to the sum of what they had
    needs_linear: ClassVar[bool] = False  # the server adds what is encoded: all before it must be linear

    def encoded(self, name: str, before: Description) -> Description:
        """Derive shape and type of an encoded tensor. Both ends do so before they read it.

        Args:
            name: PEFT's.
            before: of the tensor as the sender has it.
        """
        raise NotImplementedError

    def encode(self, parcel: Parcel, kept: Kept | None) -> tuple[Parcel, Kept]:
        """Transform a whole parcel.

        Args:
            parcel: as the transforms before this one left it.
            kept: what this transform kept in the last round; None: the sender keeps nothing.

        Returns:
            The parcel, and what to keep for the next round.

        Raises:
            WireError: names the sender and the tensor that cannot be sent.
        """
        raise NotImplementedError

    def decode(self, name: str, payload: Tensor, before: Description) -> Tensor:
        """Undo `encode` for one tensor.

        Args:
            name: PEFT's.
            payload: of the shape and type that `encoded` says; its values may be anything.
            before: of the tensor to make.
        """
        raise NotImplementedError


registry: Registry[type[Transform]] = Registry("transform", __name__)


@dataclass(frozen=True)
class Sent:
    """A parcel that is ready to leave."""

    parcel: Parcel
    kept: Mapping[str, Kept]  # by transform, for the next round
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Chain:
    """Transforms in the order in which a sender applies them; none: tensors travel as they are."""

    entries: tuple[Rule, ...] = ()  # as the plan has them
    transforms: Mapping[str, Transform] = field(default_factory=dict)  # the same, by name

    def __bool__(self) -> bool:
        return bool(self.transforms)

    def encoded(self, name: str, before: Description) -> Description:
        """Derive shape and type of a tensor as it travels."""
        return self._stages(name, before)[-1]

    def encode(self, parcel: Parcel, kept: Mapping[str, Kept] | None = None) -> Sent:
        """Apply every transform.

        Args:
            parcel: the adapter's tensors.
            kept: transform → what the site kept in the last round; None: the sender keeps nothing.

        Raises:
            WireError: names the sender and the tensor that cannot be sent.
        """
        left: dict[str, Kept] = {}
        events = []
        for name, transform in self.transforms.items():
            before = parcel.bytes
            parcel, rest = transform.encode(parcel, None if kept is None else kept.get(name, {}))
            left |= {name: rest} if rest else {}
            events.append(Event(name, before, parcel.bytes))
        return Sent(parcel, left, tuple(events))

    def decode(self, name: str, payload: Tensor, before: Description) -> Tensor:
        """Undo every transform for one tensor, whose shape and type must be as `encoded` says."""
        *stages, _ = self._stages(name, before)
        for transform, each in reversed(list(zip(self.transforms.values(), stages, strict=True))):
            payload = transform.decode(name, payload, each)
        return payload

    def _stages(self, name: str, before: Description) -> list[Description]:
        stages = [before]
        for transform in self.transforms.values():
            stages.append(transform.encoded(name, stages[-1]))
        return stages


def read(entries: Sequence[Rule], where: str) -> Chain:
    """Read the chain of transforms that a plan or a message asks for.

    Args:
        entries: transforms by name, or `{"rule": name, setting: value}`.
        where: for errors.

    Raises:
        ConfigError: an unknown transform or setting, or transforms that do not go together in this order.
    """
    chain: dict[str, Transform] = {}
    for entry in entries:
        values = {"rule": entry} if isinstance(entry, str) else dict(entry)
        name = str(values.pop("rule", ""))
        transform = registry[name].read(values, f"{where}: transform ({name})")
        _check_after(list(chain), list(chain.values()), name, transform, where)
        chain[name] = transform
    return Chain(tuple(entries), chain)


def _check_after(names: list[str], before: list[Transform], name: str, transform: Transform, where: str) -> None:
    order = get_args(Stage)
    for earlier, one in zip(names, before, strict=True):
        if order.index(one.stage) > order.index(transform.stage):
            raise ConfigError(
                f"{where}: {name} is to {transform.stage} and comes after {earlier}, which is to {one.stage}; "
                f"the order is {', '.join(order)}",
                code="transform_order",
            )
        if earlier == name or (one.stage == transform.stage != "protect"):
            raise ConfigError(
                f"{where}: {earlier} and {name} both {transform.stage}; keep one of them", code="transform_twice"
            )
        if transform.needs_linear and not one.linear:
            raise ConfigError(
                f"{where}: {name} adds what the sites send, and what {earlier} makes cannot be added; "
                f"leave {earlier} out",
                code="transform_not_linear",
            )
