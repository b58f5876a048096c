"""What a site alone knows, so that whoever writes a job cannot work out which of the site's rows is in which step.

A random number in a file beside the site file, which only the user who runs the site may read. It leaves the site in no
message, log or command line. Simulated sites have none: their site files bear the site's name, and runs are repeatable.
"""

import os
import secrets
import stat
from pathlib import Path

from ...errors import ConfigError
from ...files import open_file
from .site_config import FILE_NAME

NAME, SIZE = "fm_secret", 64  # hexadecimal digits


def make(site_file: Path) -> Path | None:
    """Make the secret of the site whose file this is, unless it has one or is simulated.

    Returns:
        The file of the secret, if it was made now.
    Raises:
        ConfigError: the folder cannot be written to.
    """
    file = site_file.with_name(NAME)
    if site_file.name != FILE_NAME or file.exists():
        return None
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(secrets.token_hex(SIZE // 2).encode())
    except FileExistsError:  # another job of the site was faster
        return None
    except OSError as error:
        raise ConfigError(
            "the site's secret cannot be written; let the user who runs the site write to the kit's local folder, or "
            "run nvflare-fm site allow",
            f"{file}: {error}",
            code="no_secret",
        ) from None
    return file


def read(site_file: Path) -> bytes:
    """The secret of the site whose file this is; empty where it is simulated.

    Raises:
        ConfigError: it is missing or cut short, or others may read it.
    """
    if site_file.name != FILE_NAME:
        return b""
    file = site_file.with_name(NAME)
    try:
        with open_file(file) as opened:
            found, mode = opened.read(SIZE + 1), os.fstat(opened.fileno()).st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(
            "the site's secret cannot be read; its admin makes it with nvflare-fm site allow",
            f"{file}: {error}",
            code="no_secret",
        ) from None
    if len(found) != SIZE or mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"the site's secret is not {SIZE} digits that its owner alone may read; delete it, and run nvflare-fm site "
            "allow",
            str(file),
            code="no_secret",
        )
    return found
