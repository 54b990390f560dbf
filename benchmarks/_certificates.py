"""An authority that no system trusts, and a server's certificate of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme

HOSTNAME = "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """Paths of PEM files."""

    authority: str
    certificate: str
    private_key: str

    def server_options(self) -> dict[str, str]:
        """Return what makes a server speak TLS."""
        return {
            "certificate": self.certificate,
            "private_key": self.private_key,
            "hostname": HOSTNAME,
        }

    def client_environ(self) -> dict[str, str]:
        """Return what makes clients trust it.

        botocore reads AWS_CA_BUNDLE. The reference library goes by the system's store, whose
        place s2n takes from OpenSSL's variables, for this process alone.
        """
        return {"AWS_CA_BUNDLE": self.authority, "SSL_CERT_FILE": self.authority}


def make(folder: Path) -> Certificates:
    """Make them in a folder."""
    authority = trustme.CA()
    issued = authority.issue_cert(HOSTNAME, "127.0.0.1")
    paths = {name: folder / f"{name}.pem" for name in Certificates.__dataclass_fields__}
    authority.cert_pem.write_to_path(paths["authority"])
    issued.private_key_pem.write_to_path(paths["private_key"])
    for blob in issued.cert_chain_pems:
        blob.write_to_path(paths["certificate"], append=True)
    return Certificates(**{name: str(path) for name, path in paths.items()})
