"""Until when a startup kit's certificates are valid. NVFlare renews none: without a new kit a site falls silent."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from ...errors import ConfigError
from ...files import read_bytes

WARNS_BEFORE = timedelta(days=30)
_LONGEST = 64 * 1024
_FILES = ("client.crt", "server.crt", "rootCA.pem")


@dataclass(frozen=True)
class Expiry:
    """The first certificate of a kit to expire."""

    file: str
    at: datetime

    @property
    def over(self) -> bool:
        return self.at <= datetime.now(UTC)

    def __str__(self) -> str:
        """In words, for the site's admin."""
        whose = "the project's root certificate" if self.file == "rootCA.pem" else "the kit's certificate"
        remedy = "" if self.at > datetime.now(UTC) + WARNS_BEFORE else "; ask the project's admin for a new kit now"
        return f"{whose} {'expired on' if self.over else 'is valid until'} {self.at.date()}{remedy}"


def expiry(kit: Path) -> Expiry | None:
    """Find the certificate of a kit that expires first.

    Returns:
        Nothing where the kit has none, as in tests.
    Raises:
        ConfigError: a certificate cannot be read.
    """
    found = []
    for file in (kit / "startup" / name for name in _FILES):
        if file.exists():
            try:
                read = x509.load_pem_x509_certificate(read_bytes(file, _LONGEST))
                found.append(Expiry(file.name, read.not_valid_after_utc))
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"{file.name} of the startup kit is no certificate; take the kit again as it was handed out",
                    f"{file}: {error}",
                    code="bad_certificate",
                ) from None
    return min(found, key=lambda each: each.at, default=None)
