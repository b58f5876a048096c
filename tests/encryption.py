"""Contexts as NVFlare's HEBuilder provisions them, made once a session: for tests and benchmarks."""

from functools import cache
from typing import Any

from nvflare.lighter.impl.he import HEBuilder

from nvflare_fm.encryption.keys import Keys, read_keys


def contexts(**settings: Any) -> tuple[bytes, bytes]:
    """What `HEBuilder` writes into the server's kit and into each site's."""
    builder = HEBuilder(**settings)
    builder.initialize(None, None)
    return builder.get_serialized_context(), builder.get_serialized_context(is_client=True)


@cache
def kits() -> tuple[Keys, Keys]:
    """The server's and the sites' keys, of one provisioning."""
    server, site = contexts()
    return read_keys(server, secret=False, whose="the server"), read_keys(site, secret=True, whose="a site")
