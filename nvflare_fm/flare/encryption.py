"""The encryption contexts of a startup kit, loaded as NVFlare's own HE components load them: signed, or not at all."""

from pathlib import Path

from nvflare.fuel.sec.security_content_service import LoadResult, SecurityContentManager
from nvflare.lighter.constants import ProvFileName

from ..encryption.keys import Keys, read_keys
from ..errors import ConfigError
from ..files import read_bytes

_MOST_BYTES = 2**26
SERVER, SITE = ProvFileName.SERVER_CONTEXT_TENSEAL, ProvFileName.CLIENT_CONTEXT_TENSEAL


def server_keys(startup: Path) -> Keys:
    """Read the context of a server's kit, which holds no key.

    Args:
        startup: the kit's startup folder.

    Raises:
        ConfigError: see `read_keys`; or the kit has no context, or one that is not signed.
    """
    return read_keys(_signed(startup, SERVER), secret=False, whose="the server")


def site_keys(startup: Path) -> Keys:
    """Read the context of a site's kit, which holds the secret key that all sites share.

    Args:
        startup: the kit's startup folder.

    Raises:
        ConfigError: see `read_keys`; or the kit has no context, or one that is not signed.
    """
    return read_keys(_signed(startup, SITE), secret=True, whose="this site")


def _signed(startup: Path, name: str) -> bytes:
    try:
        read_bytes(startup / name, _MOST_BYTES)  # NVFlare would read a file of any kind and size
        data, said = SecurityContentManager(str(startup)).load_content(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the job encrypts what sites send, and the startup kit has no {name}; provision with HEBuilder (a "
            "simulator has no kit)",
            f"{startup}: {error}",
            code="no_context",
        ) from None
    if said != LoadResult.OK:
        raise ConfigError(
            f"{name} of the startup kit is not as it was provisioned ({said.value}); in project.yml HEBuilder stands "
            "before SignatureBuilder",
            str(startup),
            code="context_not_signed",
        )
    return bytes(data)
