"""On a site's PYTHONPATH during the test: writes down each message its NVFlare processes send, before encryption.

Only the client's own processes are watched; the trainer speaks to nobody but them.
"""

import os
import sys

if any("nvflare.private.fed.app.client" in word for word in sys.orig_argv):
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell, MessageHeaderKey

    _encrypt, _file = CoreCell.encrypt_payload, f"{os.environ['FM_TAP']}/{os.getpid()}.sent"

    def _watched(self, message):
        if not message.get_header(MessageHeaderKey.ENCRYPTED, False):
            payload = message.payload
            parts = payload if isinstance(payload, list | tuple) else [payload or b""]
            with open(_file, "ab") as out:
                out.write(b"\n<message>" + repr(message.headers).encode() + b"<payload>")
                out.writelines(bytes(part) for part in parts)
        return _encrypt(self, message)

    CoreCell.encrypt_payload = _watched
