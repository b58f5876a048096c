"""The factor that a site keeps to itself where a merge rule shares only the other (FedSA-LoRA, arXiv:2410.01463)."""

from pathlib import Path

from ...adapter import LORA_A, Adapter, LoraPair, Manifest, RoundTask
from ...at_rest import standing
from ...export.folder import Saved, read_adapter, write_adapter
from ..training.distributed import processes

FOLDER, GLOBAL = "own_adapter", "global_adapter"  # the latter where only the sites can read it


class OwnAdapter:
    """The adapter that is this site's alone. In `folder` it lies as PEFT loads it: the model the site ends with.

    Args:
        folder: of the job at this site; nothing: in memory alone, so that a new trainer starts afresh.
        name: of the folder in it.
    """

    def __init__(self, folder: Path | None = None, name: str = FOLDER) -> None:
        self.folder = folder / name if folder else None
        self._adapter: Adapter | None = None

    def read(self) -> Adapter | None:
        """As it was last kept; nothing before the site has trained.

        Raises:
            ModelError: the folder is damaged.
        """
        if self._adapter is None and self.folder and standing(self.folder).exists():
            self._adapter = read_adapter(self.folder).adapter
        return self._adapter

    def keep(self, adapter: Adapter, manifest: Manifest, task: RoundTask) -> None:
        self._adapter = adapter
        if self.folder and processes()[0] == 0:
            write_adapter(self.folder, Saved(adapter, manifest, task.round, task.plan))


def shared_half(adapter: Adapter) -> Adapter:
    """What leaves the site: A as a tensor that is no half of a pair, and all that has no factors."""
    return Adapter(dense={**adapter.dense, **{n + LORA_A: adapter.lora[n].A for n in adapter.lora}})


def joined(shared: Adapter, own: Adapter) -> Adapter:
    """The federation's A beside the site's own B."""
    layers = [n for n in own.lora if n + LORA_A in shared.dense]
    pairs = {n: LoraPair(shared.dense[n + LORA_A], own.lora[n].B, own.lora[n].scale) for n in layers}
    return Adapter(pairs, {n: shared.dense[n] for n in shared.dense if not n.endswith(LORA_A)})
