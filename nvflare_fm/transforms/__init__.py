"""Transforms: what is done to an adapter's tensors before they travel, and undone where they arrive. One file each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..adapter import Description
from ..config import Rule, Settings
from ..encryption.keys import Keys
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

    def described(self, before: Mapping[str, Description]) -> Mapping[str, Description]:
        """Describe what travels of tensors so described; of ciphertexts the usual size."""
        return {name: self.encoded(name, each) for name, each in before.items()}


class Encryption(Transform):
    """A transform after which the server adds what it cannot read. It is the last of its chain."""

    stage: ClassVar[Stage] = "encrypt"
    needs_linear: ClassVar[bool] = True

    def keyed(self, keys: Keys | None) -> "Encryption":
        """The same transform with the keys of this end; without any it only describes what travels.

        Raises:
            ConfigError: there are no keys here.
        """
        raise NotImplementedError

    def summed(self, before: Mapping[str, Description]) -> Mapping[str, Description]:
        """Describe what the server's sum of such parcels travels as; of ciphertexts the usual size."""
        raise NotImplementedError

    def fits(self, sent: Mapping[str, Description], before: Mapping[str, Description]) -> bool:
        """Whether what came can be ciphertexts of tensors so described. Both are a stranger's."""
        raise NotImplementedError

    def check(self, parcel: Parcel, before: Mapping[str, Description], apart: bool) -> None:
        """Hold a site's parcel to being what `encode` makes, at the server.

        Args:
            apart: another process reads it, so that nothing in it can end this one.

        Raises:
            ConfigError: there are no keys here.
            WireError: names the sender.
        """
        raise NotImplementedError

    def added(self, parcels: Sequence[Parcel], before: Mapping[str, Description], shares: Sequence[float]) -> Parcel:
        """Σ shareₖ · parcelₖ, at the server.

        Args:
            parcels: of sites, each of tensors as `before` describes them.
            shares: public.

        Raises:
            ConfigError: there are no keys here.
            WireError: a parcel is none that `encode` makes.
        """
        raise NotImplementedError

    def decrypt(self, parcel: Parcel, before: Mapping[str, Description]) -> Mapping[str, Tensor]:
        """Undo `encode` for a whole parcel, at a site; in place of `decode`.

        Returns:
            The tensors that travelled: without those that every site can make.
        Raises:
            ConfigError: there is no key here.
            WireError: what came is no sum of updates under this key.
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

    @property
    def encryption(self) -> Encryption | None:
        """What encrypts at the end of the chain, if anything does."""
        last = next(reversed(list(self.transforms.values())), None)
        return last if isinstance(last, Encryption) else None

    @property
    def encrypts(self) -> bool:
        """Whether the server adds what travels without reading it."""
        return self.encryption is not None

    def keyed(self, keys: Keys | None) -> "Chain":
        """The same chain with the keys of this end.

        Raises:
            ConfigError: the chain encrypts, and there are no keys here.
        """
        found = self.transforms.items()
        return Chain(self.entries, {n: t.keyed(keys) if isinstance(t, Encryption) else t for n, t in found})

    @property
    def inner(self) -> "Chain":
        """The chain without its last transform."""
        return Chain(self.entries[:-1], dict(list(self.transforms.items())[:-1]))

    def encoded(self, name: str, before: Description) -> Description:
        """Derive shape and type of a tensor as it travels, where nothing encrypts it."""
        return self._stages(name, before)[-1]

    def described(self, before: Mapping[str, Description]) -> Mapping[str, Description]:
        """Describe what travels of tensors so described."""
        for transform in self.transforms.values():
            before = transform.described(before)
        return before

    def fits(self, sent: Mapping[str, Description], before: Mapping[str, Description]) -> bool:
        """Whether what came can be what the chain makes of tensors so described."""
        if self.encryption:
            return self.encryption.fits(sent, self.inner.described(before))
        return sent == self.described(before)

    def opened(self, parcel: Parcel, before: Mapping[str, Description]) -> Mapping[str, Tensor]:
        """Decrypt what travelled encrypted, and undo the transforms before that.

        Args:
            before: of the tensors as their sender had them.

        Raises:
            ConfigError, WireError: as `Encryption.decrypt`.
        """
        assert self.encryption
        found = self.encryption.decrypt(parcel, self.inner.described(before))
        return {name: self.inner.decode(name, tensor, before[name]) for name, tensor in found.items()}

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
