"""A filter on the server that keeps every byte it sends, to see what a site could learn from it."""

from pathlib import Path

from nvflare.apis.filter import Filter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils import fobs


class Spy(Filter):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        to = fl_ctx.get_peer_context().get_identity_name()
        said = fobs.dumps({"shareable": shareable, "context": fl_ctx.get_all_public_props()})
        number = len(list(Path(self.folder).iterdir()))
        (Path(self.folder) / f"{number:03d}.{to}").write_bytes(said)
        return shareable
