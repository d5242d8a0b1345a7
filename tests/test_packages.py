"""Fetching of packages, without a network: archives are made here."""

import hashlib
import tarfile
import zipfile
from pathlib import Path

import pytest

from training import packages
from training.packages import Package, fetch


@pytest.fixture
def archives(monkeypatch, tmp_path):
    """Replaces the clients by archives made on the spot; returns the list of packages that were asked for."""
    asked = []

    def download(package: Package, scratch: Path) -> Path:
        asked.append(package.name)
        content = scratch / "content.txt"
        content.write_text(package.name)
        archive = scratch / ("archive.whl" if package.client == "pypi" else "archive.tgz")
        if package.client == "pypi":
            with zipfile.ZipFile(archive, "w") as wheel:
                wheel.write(content, "content.txt")
        else:
            with tarfile.open(archive, "w:gz") as tar:
                tar.add(content, "content.txt")
        return archive

    monkeypatch.setattr(packages, "_download", download)
    return asked


@pytest.mark.parametrize("client", ["npm", "pypi"])
def test_fetch_unpacks_once(archives, tmp_path, client):
    package = Package(client, "@scope/name", "1.0", "MIT")
    folder = fetch(package, tmp_path / "cache")
    assert (folder / "content.txt").read_text() == "@scope/name"
    assert fetch(package, tmp_path / "cache") == folder
    assert archives == ["@scope/name"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{client}-scope-name-1.0"]


def test_changed_archive_is_refused(archives, tmp_path):
    package = Package("npm", "name", "1.0", "MIT", sha256=hashlib.sha256(b"other").hexdigest())
    with pytest.raises(RuntimeError, match="expected sha256"):
        fetch(package, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_client(tmp_path):
    with pytest.raises(ValueError, match="expected npm, pypi or debian"):
        fetch(Package("cargo", "name", "1.0", "MIT"), tmp_path)


def test_missing_client(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="not installed"):
        fetch(Package("npm", "name", "1.0", "MIT"), tmp_path)
