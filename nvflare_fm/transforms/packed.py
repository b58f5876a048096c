"""An adapter as it travels, and as it is read again at the other end, a tensor at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..adapter import LORA_A, LORA_B, Adapter, Described, Lazy, from_tensors
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
        tensors = Lazy(self.whole.tensors, self._decoded)
        adapter = from_tensors(tensors, self.whole.scales, self.parcel.sender, self.whole.tensors)
        sent = self.parcel.described if self.chain else {}
        return replace(adapter, described=replace(self.whole, sent=sent))

    def _decoded(self, name: str) -> Tensor:
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


def pack(adapter: Adapter, chain: Chain, sender: str, kept: Mapping[str, Kept] | None = None) -> Packed:
    """Encode an adapter for its way.

    Args:
        chain: empty: it travels as it is.
        sender: for errors.
        kept: by transform, what the site keeps of its last round; None: the sender keeps nothing.

    Raises:
        WireError: names the sender and the tensor that cannot be sent.
    """
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
