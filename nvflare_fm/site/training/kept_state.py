"""What a site keeps for transforms from round to round, in the job's folder: what rounding lost of its last update."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...at_rest import replacing, standing
from ...errors import ModelError
from ...export.step_file import check_header
from .distributed import processes

FOLDER, FILE = "transforms", "kept.safetensors"


class KeptState:
    """Tensors by transform and name, as the last round left them.

    Args:
        folder: of the job at this site; nothing: in memory alone, so that a new trainer starts afresh.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder / FOLDER if folder else None
        self._kept: dict[str, Mapping[str, Tensor]] | None = None

    def read(self) -> Mapping[str, Mapping[str, Tensor]]:
        """As it was last kept; nothing before the site's first update.

        Raises:
            ModelError: the file is damaged. Going on without it could skip what a transform needs.
        """
        if self._kept is None:
            self._kept = {}
            if self.folder and (file := standing(self.folder) / FILE).exists():
                for name, tensor in _tensors(file).items():
                    transform, _, rest = name.partition("/")
                    self._kept[transform] = {**self._kept.get(transform, {}), rest: tensor}
        return self._kept

    def keep(self, kept: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace what was kept.

        Raises:
            ModelError: the disk is full, or the job's folder may not be written to.
        """
        if kept == {} == self.read():
            return
        self._kept = dict(kept)
        if self.folder and processes()[0] == 0:
            flat = {f"{transform}/{n}": t.contiguous() for transform, found in kept.items() for n, t in found.items()}
            try:
                with replacing(self.folder) as new:
                    save_file(flat, new / FILE)
            except (OSError, SafetensorError) as error:
                raise ModelError(
                    "what transforms keep for the next round cannot be written; make room in the job's folder",
                    str(error),
                    code="kept_not_written",
                ) from None


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        check_header(file)
        with safe_open(file, framework="pt") as opened:
            found: dict[str, Tensor] = opened.get_tensors()
            return found
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"what transforms kept of the last round is damaged; remove the folder {FOLDER} from the job's folder",
            f"{file}: {error}",
            code="kept_damaged",
        ) from None
