"""What all compressions share: each tensor is encoded on its own, where that makes it smaller.

What rounding loses of a tensor goes along in the site's next round (error feedback, arXiv:1901.09847). Without it a
change that is smaller than half a step of the encoding is lost in every round, and the tensor never moves. Factors are
left out: the server turns them to canonical form after each round, so an entry of B is not the same number as before.
"""

from math import prod
from typing import ClassVar

from torch import Tensor

from ..adapter import LORA_A, LORA_B, Description
from ..errors import WireError
from . import Kept, Parcel, Stage, Transform


class Compression(Transform):
    """A transform that makes tensors smaller. Subclasses say how one tensor is packed and unpacked (`decode`)."""

    stage: ClassVar[Stage] = "compress"

    def packed(self, name: str, before: Description) -> Description:
        """Derive shape and type of what `pack` makes of a tensor of floating-point numbers."""
        raise NotImplementedError

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        """Encode one tensor of finite floating-point numbers, on its own device."""
        raise NotImplementedError

    def unpack(self, name: str, payload: Tensor, before: Description) -> Tensor:
        """Decode one tensor: the inverse of `pack`, up to `error`."""
        raise NotImplementedError

    def encoded(self, name: str, before: Description) -> Description:
        if not before.dtype.is_floating_point:
            return before
        after = self.packed(name, before)
        return after if after.bytes < before.bytes else before

    def encode(self, parcel: Parcel, kept: Kept | None) -> tuple[Parcel, Kept]:
        tensors, left = {}, {}
        described = {name: self.encoded(name, before) for name, before in parcel.described.items()}
        for name, before in parcel.described.items():
            tensor = parcel.tensors[name]
            if described[name] == before:
                tensors[name] = tensor
                continue
            feeds_back = kept is not None and not name.endswith((LORA_A, LORA_B))
            if feeds_back and kept and name in kept and kept[name].shape == tensor.shape:
                tensor = tensor + kept[name].to(tensor)
            if not tensor.isfinite().all():
                raise WireError(
                    f"{parcel.sender} has values that are not finite numbers in {name!r}, so they cannot be encoded; "
                    "training diverged, so lower the learning rate or look at the data",
                    code="not_finite",
                )
            tensors[name] = self.pack(name, tensor)
            if feeds_back:
                left[name] = tensor - self.unpack(name, tensors[name], before)
        return Parcel(parcel.sender, tensors, described), left

    def decode(self, name: str, payload: Tensor, before: Description) -> Tensor:
        return payload if self.encoded(name, before) == before else self.unpack(name, payload, before)


def by_direction(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and their length, in which the numbers of a tensor are of one size: of a factor its directions, each of
    which has its own singular value; all else is one row.
    """
    if len(shape) == 2 and name.endswith(LORA_A):
        return shape[0], shape[1]
    if len(shape) == 2 and name.endswith(LORA_B):
        return shape[1], shape[0]
    return 1, prod(shape)
