"""Files that are images: by which formats and suffixes, and how a folder is searched for them."""

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from PIL import Image, features

from mae.errors import UserError

# The formats that Pillow may read, with their suffixes. It goes by the content, and a file named .jpg must not start,
# say, its Ghostscript reader. JPEG is first, as the first format that accepts the content wins.
FORMATS = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "PNG": {".png"},
    "WEBP": {".webp"},
    "BMP": {".bmp"},
    "GIF": {".gif"},
    "TIFF": {".tif", ".tiff"},
    "PPM": {".ppm", ".pgm", ".pbm", ".pnm"},
}

# Formats that this installation may lack: suffixes, what reads them, and how an error names that.
OPTIONAL_FORMATS = {
    "JPEG2000": ({".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"}, "jpg_2000", "Pillow with OpenJPEG"),
    "AVIF": ({".avif"}, "avif", "Pillow 11.3 or newer"),
    "HEIF": ({".heic", ".heif", ".hif"}, "pillow_heif", 'pip install "vit-mae-lightning[heif]"'),
    "JXL": ({".jxl"}, "pillow_jxl", "pip install pillow-jxl-plugin"),
}

# Images by their suffix that nothing here reads.
OTHER_IMAGES = (
    *(".arw", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".hdr", ".ico", ".nef", ".nii", ".orf", ".pcx", ".pfm"),
    *(".psd", ".raf", ".raw", ".rw2", ".svg", ".tga"),
)

# Where a format comes from a package: the call that makes Pillow know it, and the start of such files.
PLUGINS: dict[str, tuple[Callable[[], object], re.Pattern[bytes]]] = {
    "HEIF": (lambda: import_module("pillow_heif").register_heif_opener(), re.compile(rb"....ftyp(?!avi[fs])", re.S)),
    "JXL": (lambda: import_module("pillow_jxl"), re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ")),
}


def optional_formats() -> tuple[dict[str, set[str]], dict[str, str]]:
    """Formats that this installation reads besides the usual ones, with their suffixes; and what reads other suffixes.

    The second is by suffix, in lower case: what to install, or "" where nothing helps.
    """
    read, unread = {}, dict.fromkeys(OTHER_IMAGES, "")
    for name, (suffixes, reader, remedy) in OPTIONAL_FORMATS.items():
        built_in = reader in {*features.modules, *features.codecs} and features.check(reader)
        if built_in or (name in PLUGINS and find_spec(reader)):
            read[name] = suffixes
        else:
            unread |= dict.fromkeys(suffixes, remedy)
    return read, unread


READ_OPTIONALLY, UNREAD_SUFFIXES = optional_formats()
FORMATS |= READ_OPTIONALLY

IMAGE_SUFFIXES = frozenset({".npy"}.union(*FORMATS.values()))  # compared in lower case

# Folders that systems and programs make, compared in lower case; left out as hidden ones are.
SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}

WIDE_SUFFIXES = {".npy"} | FORMATS["TIFF"]  # of files that may hold more than 8 bits a sample when they are decoded


def formats_for(data: bytes) -> list[str]:
    """The formats that Pillow may try on a file: those of FORMATS, of plugins only the one it looks like."""
    names = [name for name in FORMATS if name not in PLUGINS or PLUGINS[name][1].match(data)]
    for name in names:
        if name in PLUGINS and name not in Image.OPEN:  # such packages are imported for the first such file
            PLUGINS[name][0]()
    return names


@dataclass
class Leftovers:
    """What a listing met besides the images it gives.

    Attributes:
        suffixes: Files that are images by a suffix in UNREAD_SUFFIXES, by suffix.
        specials: Pipes, sockets and devices, by what they are.
        hidden: Names of hidden and system folders that hold images.
        folders: Paths of all other folders.
    """

    suffixes: Counter[str] = field(default_factory=Counter)
    specials: Counter[str] = field(default_factory=Counter)
    hidden: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)

    def add_file(self, suffix: str) -> None:
        if suffix in UNREAD_SUFFIXES:
            self.suffixes[suffix] += 1

    def add_member(self, name: str, suffix: str, hidden: str, is_folder: bool) -> None:
        """Note a member of a tar file, which is no image or lies in the folder `hidden`."""
        if hidden:
            if suffix in IMAGE_SUFFIXES and not is_folder:
                self.hidden.add(hidden)
        elif is_folder:
            self.folders.add(name)
        else:
            self.add_file(suffix)

    def note(self) -> str:
        """What was left out, "left out: .heic 2, folder @eaDir"; "" if nothing was."""
        parts = []
        for suffix, count in sorted(self.suffixes.items()):
            remedy = UNREAD_SUFFIXES[suffix]
            parts.append(f"{suffix} {count:,}" + (f" ({remedy})" if remedy else ""))
        parts += [f"{kind} {count:,}" for kind, count in sorted(self.specials.items())]
        parts += [f"folder {name}" for name in sorted(self.hidden)]
        return f"left out: {', '.join(parts)}" if parts else ""

    def no_image(self, where: object) -> UserError:
        """The error for a place without images."""
        if not self.suffixes:
            return UserError(f"{where} holds no image" + (f"; {note}" if (note := self.note()) else ""))
        way_out = "" if all(UNREAD_SUFFIXES[suffix] for suffix in self.suffixes) else "; convert to PNG, TIFF or JPEG"
        return UserError(f"{where} holds no image that can be read; {self.note()}{way_out}")


def find_images(root: str | Path, leftovers: Leftovers | None = None) -> list[str]:
    """All image files below `root` at any depth, as POSIX paths relative to it, in code point order on every machine.

    Image files are known by their suffix; hidden files and folders (.name) and SYSTEM_FOLDERS are left out. Links to
    folders are followed unless they lead back to a folder above them. A dangling link to an image is listed, so that it
    is reported.

    Args:
        leftovers: Gets what else is there.

    Raises:
        UserError: A folder cannot be read.
    """
    found = []
    for path, entry in walk_files(Path(root), leftovers):
        suffix = os.path.splitext(path)[1].lower()
        if not (entry.is_symlink() or entry.is_file()):  # of a link to itself nothing else can be asked
            if leftovers is not None:
                leftovers.specials[kind_of_special(entry)] += 1
        elif suffix in IMAGE_SUFFIXES:
            found.append(path)
        elif leftovers is not None:
            leftovers.add_file(suffix)
    return sorted(found)


def walk_files(root: Path, leftovers: Leftovers | None = None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All that is not a folder below `root`, in no order; hidden entries and links as for `find_images`."""
    # Each folder on the stack has the identities of the folders above it: a link to one of these would never end.
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while stack:
        folder, above = stack.pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in above:
                continue
            inside = above | {(status.st_dev, status.st_ino)}
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    hidden = entry.name.startswith(".")
                    if hidden and leftovers is None:
                        continue
                    if not is_dir(entry):
                        if not hidden:
                            yield name, entry
                    elif hidden or is_hidden(entry.name):
                        if leftovers and entry.name not in leftovers.hidden and holds_images(Path(entry.path)):
                            leftovers.hidden.add(entry.name)
                    else:
                        stack.append((name, inside))
                        if leftovers:
                            leftovers.folders.add(name)
        except OSError as error:
            raise UserError(f"cannot list the folder {root / folder}: {error.strerror}") from error


def is_hidden(name: str) -> bool:
    """Whether a folder is left out: a hidden one, or one that a system or program made."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def holds_images(folder: Path, files: int = 1000) -> bool:
    """Whether one of the first `files` files in a folder is an image; not if it cannot be read."""
    with suppress(UserError):
        return any(os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES for path, _ in islice(walk_files(folder), files))
    return False


def kind_of_special(entry: os.DirEntry[str]) -> str:
    """What a file is that is no regular one."""
    with suppress(OSError):
        mode = entry.stat(follow_symlinks=False).st_mode
        return "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
    return "vanished file"


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False
