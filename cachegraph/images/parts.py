"""The parts of a sample file while it is made, and the file that they become."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cachegraph.errors import InputError
from cachegraph.folders import make_folder, replaced

_PART = re.compile(r"(\d{8})-(\d{8})\.npz")
_RUN = "run.json"


class Parts:
    """A folder beside the file to come, with the images that are done.

    Args:
        out: the ``.npz`` file to come.
        asked: what tells these images from others, as plain data.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any]) -> None:
        self.out, self.folder = out, out.with_name(out.name + ".parts")
        self._asked = json.dumps(asked, sort_keys=True)

    def is_whole(self) -> bool:
        """True where the file is there already.

        Raises:
            InputError: the file, or the folder of its parts, holds other images.
        """
        mark = self.folder / _RUN
        if self.folder.exists():
            text = mark.read_text(encoding="utf-8") if mark.is_file() else ""
            self._refuse_other(text, self.folder)
        if not self.out.exists():
            return False
        try:
            with np.load(self.out, allow_pickle=False) as opened:
                found = str(opened["run"]) if "run" in opened else ""
        except (OSError, ValueError, zipfile.BadZipFile):
            found = ""
        self._refuse_other(found, self.out)
        return True

    def begin(self) -> None:
        """Make the folder; what a killed process left half-written is removed."""
        make_folder(self.folder, "choose another path")
        with replaced(self.folder / _RUN) as partial:
            partial.write_text(self._asked, encoding="utf-8")
        for path in self.folder.glob("*.partial"):
            path.unlink()

    def done(self) -> list[tuple[int, int]]:
        """First and last index, exclusive, of what is there; in order."""
        names = (_PART.fullmatch(path.name) for path in self.folder.glob("*.npz"))
        return sorted((int(name[1]), int(name[2])) for name in names if name)

    def write(self, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Images ``first`` on.

        Args:
            first: index of the first one.
            arrays: ``pixels (N, H, W, 3)`` uint8 and ``labels (N,)``; what else the first part
                has goes along.
        """
        stop = first + len(arrays["pixels"])
        with (
            replaced(self.folder / f"{first:08d}-{stop:08d}.npz") as partial,
            partial.open("wb") as file,
        ):
            np.savez(file, allow_pickle=False, **arrays)

    def join(self, count: int) -> None:
        """Write the file, an image at a time in memory, and remove the parts."""
        with replaced(self.out) as partial, zipfile.ZipFile(partial, "w") as archive:
            self._write_pixels(archive, count)
            for name, array in self._others(count):
                with archive.open(_entry(name), "w") as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        shutil.rmtree(self.folder)

    def _write_pixels(self, archive: zipfile.ZipFile, count: int) -> None:
        at = 0
        with archive.open(_entry("arr_0"), "w", force_zip64=True) as file:
            for first, stop in self.done():
                with np.load(self._path(first, stop)) as part:
                    pixels = part["pixels"][: count - first]
                if first != at:
                    raise InputError("images are missing", place=str(self.folder), found=str(at))
                if first == 0:
                    shape = (count, *pixels.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(pixels.tobytes())
                at += len(pixels)
        if at != count:
            raise InputError("images are missing", place=str(self.folder), found=f"{at}")

    def _others(self, count: int) -> Iterator[tuple[str, np.ndarray]]:
        labels = []
        for first, stop in self.done():
            with np.load(self._path(first, stop)) as part:
                labels.append(part["labels"][: count - first])
                for name in sorted({*part.files} - {"pixels", "labels"} if first == 0 else ()):
                    yield name, part[name]
        yield "arr_1", np.concatenate(labels)
        yield "run", np.array(self._asked)

    def _path(self, first: int, stop: int) -> Path:
        return self.folder / f"{first:08d}-{stop:08d}.npz"

    def _refuse_other(self, found: str, place: Path) -> None:
        if found == self._asked:
            return
        try:
            other = json.loads(found)
        except ValueError:
            raise InputError(
                "the output exists and is no file of samples",
                place=str(place),
                remedy="choose another path or remove it",
            ) from None
        asked = json.loads(self._asked)
        differ = [key for key in asked if other.get(key) != asked[key]]
        raise InputError(
            f"the output holds images of another {', '.join(differ)}",
            place=str(place),
            expected=f"{differ[0]} {str(asked[differ[0]])[:60]}" if differ else "",
            found=str(other.get(differ[0]))[:60] if differ else "",
            remedy="choose another path or remove it",
        )


def _entry(name: str) -> zipfile.ZipInfo:
    """An entry without a time, so that equal images make equal files."""
    return zipfile.ZipInfo(f"{name}.npy")
