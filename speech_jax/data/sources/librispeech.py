"""LibriSpeech: folders SPEAKER/CHAPTER of audio and .trans.txt, or the official archives."""

import contextlib
import itertools
import os
import pathlib
import unicodedata

from speech_jax.data import audio
from speech_jax.data.sources import archive, base


def open_split(
    root: pathlib.Path, split: str, on_error: str, cache: pathlib.Path, *, download: bool = True
) -> base.FileSource:
    """Opens root/split in the official layout, or its archive, or downloads it."""
    folder = _librispeech_folder(root, split, cache, download)
    files, transcripts, problems = _scan(folder)
    if not files and not transcripts and not problems:
        raise base.SourceError(
            f"split {split!r} is empty: {folder} has no SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt; "
            f"splits with data in {root}: {base.listed(_librispeech_splits(root))}"
        )
    for name in sorted(transcripts.keys() - files.keys()):
        problems[name] = f"transcript without audio; add the file {name}.flac or delete the line"
    for name in sorted(files.keys() - transcripts.keys()):
        problems[files[name]] = "audio without transcript; add its line to the .trans.txt beside it"
    usable = {files[name]: name for name in files if transcripts.get(name)}
    for name in sorted(files.keys() & transcripts.keys()):
        if not transcripts[name]:
            problems[files[name]] = "empty transcript; complete its line in the .trans.txt"
    chapters: dict[tuple[str, str], dict[str, str]] = {}
    rows = []
    for path, name in usable.items():
        speaker, chapter = path.split(os.sep)[-3:-1]
        tags = {"speaker": speaker, "chapter": chapter}
        tags = chapters.setdefault((speaker, chapter), tags)  # one dict for all of a chapter
        rows.append(base.Row(path, name, path, transcripts[name], tags))
    kept = base.durations_file(cache, folder)
    return base.from_rows(f"split {split!r} of {root}", rows, folder, kept, problems, on_error)


def _librispeech_folder(
    root: pathlib.Path, split: str, cache: pathlib.Path, download: bool
) -> pathlib.Path:
    """Returns the folder of a split, unpacking or fetching its archive where that is needed."""
    unpacked = cache / "librispeech" / base.digest(root)
    # An official archive unpacked by hand gives root/LibriSpeech/split.
    for folder in (root / split, root / "LibriSpeech" / split, unpacked / split):
        if folder.is_dir():
            return folder
    for file in (root / f"{split}.tar.gz", unpacked / f"{split}.tar.gz"):
        if file.is_file():
            return _unpack(file, root, unpacked, split)
    if split in archive.ARCHIVES and download:
        return _unpack(_fetch(root, unpacked, split), root, unpacked, split)
    if not root.is_dir():
        raise base.SourceError(
            f"the data root {root} does not exist; set it to the folder that holds {split!r}"
        )
    raise base.SourceError(
        f"there is no split {split!r} in {root}; it has {base.listed(_librispeech_splits(root))}, "
        f"and those that can be downloaded are {base.listed(archive.ARCHIVES)}"
    )


def _unpack(
    file: pathlib.Path, root: pathlib.Path, unpacked: pathlib.Path, split: str
) -> pathlib.Path:
    """Unpacks an archive into the root or, where that cannot be written, into the cache."""
    folder = (root if base.is_writable(root) else unpacked) / split
    try:
        archive.extract(file, folder)
    except archive.ArchiveError as error:
        raise base.SourceError(str(error)) from error
    return folder


def _fetch(root: pathlib.Path, unpacked: pathlib.Path, split: str) -> pathlib.Path:
    """Downloads the archive of an official split and returns where it is."""
    official = archive.ARCHIVES[split]
    created = not root.exists()
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
    file = (root if base.is_writable(root) else unpacked) / f"{split}.tar.gz"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        archive.download(official.url, file, official.md5)
    except (archive.ArchiveError, OSError) as error:
        if created:
            with contextlib.suppress(OSError):  # not empty: a part that the next try resumes
                root.rmdir()
        raise base.SourceError(
            f"split {split!r} is not in {root} and cannot be downloaded: {error}; fetch "
            f"{official.url} by hand into {root}, or run configs/quickstart.py, which needs none"
        ) from error
    return file


def _scan(folder: pathlib.Path) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Returns (id -> audio file, id -> text, name -> problem) of folder/SPEAKER/CHAPTER/."""
    files, transcripts, problems = {}, {}, {}
    for chapter in itertools.chain.from_iterable(map(base.subfolders, base.subfolders(folder))):
        for path in sorted(entry.path for entry in os.scandir(chapter)):
            file = os.path.basename(path)
            name, _, extension = unicodedata.normalize("NFC", file).rpartition(".")
            if file.startswith("."):
                continue
            if file.endswith(".trans.txt"):
                _read_transcripts(path, transcripts, problems)
            elif extension.lower() not in audio.EXTENSIONS:
                continue
            elif name in files:
                problems[path] = f"second audio file of {name!r}, after {files[name]}; keep one"
            else:
                files[name] = path
    return files, transcripts, problems


def _read_transcripts(path: str, transcripts: dict[str, str], problems: dict[str, str]) -> None:
    """Adds the lines 'ID TEXT' of a transcript file to `transcripts`."""
    try:
        lines = base.read_text(pathlib.Path(path)).split("\n")
    except base.SourceError as error:
        problems[path] = str(error).removeprefix(f"{path} ").removeprefix("is ")
        return
    for number, line in enumerate(lines, 1):
        name, *text = line.split(maxsplit=1)[:2] or [""]
        name = unicodedata.normalize("NFC", name)
        if name in transcripts:
            problems[f"{path}:{number}"] = f"second transcript of {name!r}; keep one"
        elif name:
            transcripts[name] = "".join(text).strip()


def _librispeech_splits(root: pathlib.Path) -> list[str]:
    folders = [
        folder for place in (root, root / "LibriSpeech") for folder in base.subfolders(place)
    ]
    found = {os.path.basename(folder) for folder in folders if _has_transcripts(folder)}
    return sorted(found | {path.name.removesuffix(".tar.gz") for path in root.glob("*.tar.gz")})


def _has_transcripts(folder: str) -> bool:
    return any(pathlib.Path(folder).glob("*/*/*.trans.txt"))
