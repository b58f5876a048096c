"""An adapter as it travels, and as it is read again at the other end, a tensor at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..adapter import LORA_A, LORA_B, Adapter, Described, Lazy, from_tensors
from ..encryption.keys import Keys
from ..errors import WireError
from . import Chain, Event, Kept, Parcel


@dataclass(frozen=True)
class Packed:
    """What travels of an adapter, and all that is needed to read it."""

    chain: Chain
    parcel: Parcel
    whole: Described  # the adapter before it was encoded
    kept: Mapping[str, Kept] = field(default_factory=dict)  # by transform, for the site's next round
    events: tuple[Event, ...] = ()

    def adapter(self) -> Adapter:
        """The adapter as its receiver reads it. A tensor is decoded at each access and not kept.

        Raises:
            WireError: factors or scales do not belong together; when a tensor is read: its values are no numbers.
        """
        if self.chain.encrypts:
            return self.sealed()
        tensors = Lazy(self.whole.tensors, self._decoded)
        adapter = from_tensors(tensors, self.whole.scales, self.parcel.sender, self.whole.tensors)
        return replace(adapter, described=replace(self.whole, sent=self.parcel.described if self.chain else {}))

    def sealed(self) -> "Sealed":
        """The adapter as whoever has no key receives it: all of it but the values of its tensors.

        Raises:
            WireError: factors or scales do not belong together.
        """
        tensors = Lazy(self.whole.tensors, self._decoded)
        adapter = from_tensors(tensors, self.whole.scales, self.parcel.sender, self.whole.tensors)
        return Sealed(adapter.lora, adapter.dense, replace(self.whole, sent=self.parcel.described), self)

    def opened(self, keys: Keys | None) -> Mapping[str, Tensor]:
        """Decrypt what travelled: the tensors by PEFT's names, without those that every site can make.

        Args:
            keys: of a site.

        Raises:
            ConfigError: there are no keys here.
            WireError: what came is no sum of updates under these keys.
        """
        return self.chain.keyed(keys).opened(self.parcel, self.whole.tensors)

    def _decoded(self, name: str) -> Tensor:
        if self.chain.encrypts:
            raise WireError(f"{name!r} is encrypted, and only a site can read it", code="sealed")
        payload = self.parcel.tensors[name]
        if not self.chain:
            return payload
        tensor = self.chain.decode(name, payload, self.whole.tensors[name])
        if not math.isfinite(torch.linalg.vector_norm(tensor, dtype=torch.float64)):
            raise WireError(
                f"{self.parcel.sender} sent {name!r} encoded, and it decodes to values that are not finite numbers; "
                "its training diverged, or the message is damaged",
                code="not_finite",
            )
        return tensor


@dataclass(frozen=True)
class Sealed(Adapter):
    """An adapter that only a site can read. All but the values of its tensors is known."""

    packed: Packed = field(default_factory=lambda: Packed(Chain(), Parcel("", {}, {}), Described({}, {})))

    @property
    def sealed(self) -> bool:
        return True


def added(keys: Keys, adapters: Sequence[Adapter], shares: Sequence[float]) -> Sealed:
    """Σ shareₖ · adapterₖ of encrypted adapters of the same tensors, without reading one.

    Args:
        keys: the server's.
        shares: public.

    Raises:
        WireError: an adapter is not encrypted, or is no such ciphertext.
    """
    sealed = [adapter.packed for adapter in adapters if isinstance(adapter, Sealed)]
    if len(sealed) < len(adapters) or not (found := sealed[0].chain.encryption):
        raise WireError("an update is not encrypted, and cannot be added to those that are", code="not_encrypted")
    chain, whole = sealed[0].chain, sealed[0].whole
    parcels = [packed.parcel for packed in sealed]
    packed = Packed(chain, found.keyed(keys).added(parcels, chain.inner.described(whole.tensors), shares), whole)
    return packed.sealed()


def check_sealed(keys: Keys, adapter: Adapter, sender: str, apart: bool) -> None:
    """Hold what a site sent to being encrypted, and such that it can be added.

    Args:
        keys: the server's.
        apart: another process reads it, so that nothing in it can end this one.

    Raises:
        WireError: names the site.
    """
    found = adapter.packed.chain.encryption if isinstance(adapter, Sealed) else None
    if not (isinstance(adapter, Sealed) and found):
        raise WireError(f"{sender} sent an update that is not encrypted", code="not_encrypted")
    packed = adapter.packed
    found.keyed(keys).check(packed.parcel, packed.chain.inner.described(packed.whole.tensors), apart)


def pack(adapter: Adapter, chain: Chain, sender: str, kept: Mapping[str, Kept] | None = None) -> Packed:
    """Encode an adapter for its way.

    Args:
        chain: empty: it travels as it is. So does what is encrypted already.
        sender: for errors.
        kept: by transform, what the site keeps of its last round; None: the sender keeps nothing.

    Raises:
        WireError: names the sender and the tensor that cannot be sent.
    """
    if isinstance(adapter, Sealed):
        return adapter.packed
    described = dict(adapter.descriptions())
    sent = chain.encode(Parcel(sender, _flat(adapter), described), kept)
    return Packed(chain, sent.parcel, Described(described, adapter.scales()), sent.kept, sent.events)


def _flat(adapter: Adapter) -> Mapping[str, Tensor]:
    """The adapter's tensors by PEFT's names, each read when it is asked for."""

    def load(name: str) -> Tensor:
        for half, factor in ((LORA_A, "A"), (LORA_B, "B")):
            if name.endswith(half) and (layer := name.removesuffix(half)) in adapter.lora:
                tensor: Tensor = getattr(adapter.lora[layer], factor)
                return tensor
        return adapter.dense[name]

    return Lazy([*adapter.dense, *(layer + half for layer in adapter.lora for half in (LORA_A, LORA_B))], load)
