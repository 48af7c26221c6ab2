"""Looks for files: all below a folder, or one by a name that may lack its folder or its suffix."""

import os
from collections.abc import Iterable
from pathlib import Path

from memseg_jax.errors import UserError
from memseg_jax.runtime.text import first_few

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def holds(folder: Path) -> str:
    """A sentence with the first entries of a folder."""
    entries = sorted(e.name + "/" * e.is_dir() for e in folder.iterdir() if e.name[0] != ".")
    if not entries:
        return f"{folder} is empty."
    return f"{folder} holds {', '.join(first_few(entries))}."


def files_by_stem(folder: Path) -> dict[str, list[Path]]:
    """All visible files below a folder by stem (relative path without suffix, with "/")."""
    found = {}
    visited = set()

    def refuse(error):
        raise UserError(f"{error.filename}: the folder cannot be read ({error.strerror}).")

    # Links to folders are followed: large data sets are often put together from them.
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(files):
            if name[0] != ".":
                path = Path(parent, name)
                stem = path.relative_to(folder).with_suffix("").as_posix()
                found.setdefault(stem, []).append(path)
    return found


def one_of_each(scan: dict[str, list[Path]], suffixes: tuple[str, ...], kind: str):
    """Stem -> the one file with such a suffix; two of them are an error."""
    chosen = {}
    for stem, paths in scan.items():
        matching = [path for path in paths if path.suffix.lower() in suffixes]
        if len(matching) > 1:
            raise _two_of(matching, kind)
        if matching:
            chosen[stem] = matching[0]
    return chosen


def _two_of(paths: list[Path], kind: str) -> UserError:
    return UserError(
        f"{paths[0]} and {paths[1].name}: two {kind} files with the same stem. Keep one of them in "
        "the folder; if one is the label of the other, say how labels are called, such as "
        "config.data.label_name = '{stem}.png', or list the pairs in config.data.list_file."
    )


class Finder:
    """Finds files by what a list or a config calls them; every folder is read once."""

    def __init__(self) -> None:
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def find(
        self,
        folders: Iterable[Path],
        name: str,
        suffixes: tuple[str, ...],
        kind: str,
        but_not: Path | None = None,
    ) -> Path | None:
        """Finds one file.

        Args:
            folders: where to look, in this order; a name that is an absolute path ignores them.
            name: in each of them first the file of this very name, then the name with one of the
                suffixes added, then with its own replaced by one of them.
            suffixes: in lower case.
            kind: "image" or "label", for messages.
            but_not: a file that is passed over.

        Returns:
            Its path, without "..", or None.

        Raises:
            UserError: a suffix is missing, and two files would do.
        """
        for folder in folders:
            path = Path(os.path.normpath(folder / name))
            if not path.name:
                continue
            stems = self._listing(path.parent)
            exact = path.name in stems.get(path.stem, ())
            if exact and path != but_not:
                return path
            tries = [path.name]
            if path.suffix.lower() in (*IMAGE_SUFFIXES, *suffixes):
                tries.append(path.stem)
            for stem in tries:
                found = [path.with_name(file) for file in stems.get(stem, ())]
                found = [p for p in found if p.suffix.lower() in suffixes and p != but_not]
                if len(found) > 1:
                    raise _two_of(found, kind)
                if found:
                    return found[0]
        return None

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """The names of the files of a folder, by stem; none if there is no such folder."""
        if folder not in self._listings:
            stems: dict[str, list[str]] = {}
            try:
                with os.scandir(folder) as entries:
                    names = sorted(entry.name for entry in entries if entry.is_file())
            except OSError:
                names = []
            for name in names:
                stems.setdefault(Path(name).stem, []).append(name)
            self._listings[folder] = stems
        return self._listings[folder]
