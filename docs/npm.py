"""Files of packages that npm has, for pages that work without a network: a fixed version, checked by SHA-256."""

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path


class NotFetched(Exception):
    """Why a package cannot be had here."""


def files(package, sums, npm="npm"):
    """{name: content} of some files of a package, whose SHA-256 are given as {name: sum}."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, tarfile.open(_packed(package, folder, npm)) as archive:
        for name, expected in sums.items():
            found[name] = archive.extractfile(f"package/{name}").read()
            made = hashlib.sha256(found[name]).hexdigest()
            if made != expected:
                raise NotFetched(f"{name} of {package} has the SHA-256 {made}, expected {expected}")
    return found


def _packed(package, folder, npm):
    command = [npm, "pack", "--silent", "--prefer-offline", "--pack-destination", folder, package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    except FileNotFoundError:
        raise NotFetched(f"{npm} is not installed, which fetches {package}") from None
    except subprocess.TimeoutExpired:
        raise NotFetched(f"{npm} pack {package} did not end in 300 s") from None
    except subprocess.CalledProcessError as error:
        said = " ".join((error.stderr or error.stdout).split())
        raise NotFetched(f"{npm} pack {package} failed: {said[:300]}") from None
    return Path(folder) / done.stdout.split()[-1]
