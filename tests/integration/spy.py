"""Two who look over the server's shoulder: at every byte it sends, and at what it holds while it merges."""

from pathlib import Path

from nvflare.apis.filter import Filter
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.fuel.utils import fobs
from torch import Tensor

from nvflare_fm.export.folder import WEIGHTS


class Spy(Filter):
    """Keeps every message in `folder`, to see what a site could learn from it."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        to = fl_ctx.get_peer_context().get_identity_name()
        said = fobs.dumps({"shareable": shareable, "context": fl_ctx.get_all_public_props()})
        number = len(list(Path(self.folder).iterdir()))
        (Path(self.folder) / f"{number:03d}.{to}").write_bytes(said)
        return shareable


class Held(FLComponent):
    """Writes into `file`, a line a merge: the tensors of the global adapter on the server, and how many of them lie in
    the mapping of an adapter's file, whose pages the kernel can take back.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == AppEventType.BEFORE_AGGREGATION:
            tensors = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS].values()
            with Path(self.file).open("a") as out:
                out.write(f"{len(tensors)} {sum(map(of_a_file, tensors))}\n")


def of_a_file(tensor: Tensor) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return WEIGHTS in line
    return False
