"""Audio files of every container as blocks of samples, read until there is no more.

A header is a claim: it may be missing, zero, unknown or wrong. What comes out of a decoder is what
counts, and whatever a decoder throws is an AudioError that names the file. soundfile reads most
containers; PyAV (the extra `av`) reads those of phones and browsers.
"""

import contextlib
import functools
import os
import re
import threading
from collections.abc import Iterator
from typing import BinaryIO, Protocol

import numpy as np
import soundfile
from absl import logging

from speech_jax.errors import UserError

# Extensions of the files that are taken for audio: what soundfile opens from its content alone
# (no headerless PCM), and what PyAV opens.
EXTENSIONS = frozenset(
    ["aif", "aifc", "aiff", "au", "caf", "flac", "mp3", "nist", "oga", "ogg", "opus", "rf64", "snd"]
    + ["sph", "w64", "wav", "wave", "wavex"]
    + ["3gp", "aac", "amr", "gsm", "m4a", "m4b", "mka", "mkv", "mov", "mp4", "webm", "wma"]
)
# Rates that recordings have, in Hz. A header outside of them is damaged.
RATES = (2_000, 768_000)
# A decoded file may miss this many seconds of what its header says (MP3 padding).
SLACK = 0.1

_BLOCK = 1 << 20  # values (samples times channels) that are decoded at once
_PREROLL = 2.0  # seconds before a position from which lossy decoders get their state again
# Encodings whose samples soundfile converts to int16 without a choice of scale; the others are
# floating point (float WAV, Opus, Vorbis, MP3) and full scale is 1.0.
_INTEGER = frozenset({"PCM_16", "PCM_24", "PCM_32", "PCM_S8", "PCM_U8", "ULAW", "ALAW"})
_WIDTHS = {"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "PCM_S8": 1, "ULAW": 1, "ALAW": 1, "FLOAT": 4}
# From this many frames up libsndfile means "unknown".
_UNKNOWN_FRAMES = 1 << 48
# Bytes that may follow the audio, as tags do.
_TAIL = 2048

# What libsndfile's log tells of damage: a cut Ogg, a lost page, a chunk longer than the file, and
# something that is no chunk where one belongs.
_CUT_OGG = re.compile(r"Junk after the last page")
_TROUBLE = re.compile(r"Junk|hole|Skipped|should be|Exiting parser")
_NO_END_MARK = re.compile(r"lacks an end-of-stream")
_HOLE = re.compile(r"reports a hole|Skipped \d+ bytes looking")
_CUT_CHUNK = re.compile(
    r"^\s*(?:data|SSND|riff|Data Size|Riff size) *: (\d+) \(should be (\d+)\)", re.M
)
_NO_CHUNK = re.compile(r"Unknown chunk marker .* at position (\d+)[^.]*\. Exiting parser")
# Sizes from here up stand for "unknown" in files written to a pipe: not a sign of a cut.
_UNKNOWN_SIZE = 0x7FFF0000

# First bytes -> (name for people, FFmpeg's name) of what PyAV reads.
_CONTAINERS = (
    (re.compile(rb"....(ftyp|moov|mdat|wide|free|skip)", re.S), "MPEG-4 (m4a, mp4, 3gp)", "mov"),
    (re.compile(rb"\x1aE\xdf\xa3"), "Matroska (webm, mkv)", "matroska"),
    (re.compile(rb"#!AMR"), "AMR", "amr"),
    (re.compile(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"), "Windows Media", "asf"),
    (re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"), "AAC", "aac"),
)


class AudioError(UserError):
    """An audio file that cannot be used; the message names the file and the reason."""


class UnsupportedError(AudioError):
    """A container that nothing installed reads; the message says how to convert or install."""


class Decoder(Protocol):
    """An open file."""

    rate: int  # Hz
    channels: int
    frames: int | None  # its length; None where no header can be believed
    floating: bool  # blocks are float32, full scale at 1.0, and not int16
    seeks: bool  # blocks(start) costs about the same for every start

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yields [n, channels] of the frames from `start` up to `stop`, by default to the end.

        What does not seek yields all, whatever is asked for. Raises AudioError for damage and for a
        file that ends early.
        """
        ...


@contextlib.contextmanager
def opened(file: str | BinaryIO) -> Iterator[Decoder]:
    """Opens the audio in `file`. Raises AudioError, here and in the body, for all that is wrong."""
    name = name_of(file)
    with contextlib.ExitStack() as stack:
        try:
            if isinstance(file, (str, os.PathLike)):
                if not os.path.isfile(file):
                    raise AudioError(f"{name}: no such file")
                # Unbuffered, for libsndfile reads from the descriptor itself.
                file = stack.enter_context(open(file, "rb", buffering=0))
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size == 0:
                raise AudioError(f"{name}: the file is empty (0 bytes)")
            decoder = _open(file, name, size, stack)
            if not RATES[0] <= decoder.rate <= RATES[1]:
                raise AudioError(
                    f"{name}: its header says {decoder.rate} Hz, which no recording has; the "
                    "header is damaged"
                )
            yield decoder
        except AudioError:
            raise
        except OSError as error:
            raise AudioError(
                f"{name}: cannot be read ({_reason(error)}); correct its rights or bring it back"
            ) from error
        except Exception as error:  # of any type: libraries differ, and change
            raise AudioError(
                f"{name}: cannot be decoded ({_reason(error)}); it is truncated or damaged"
            ) from error


def name_of(file: str | BinaryIO) -> str:
    """Returns what to call `file` in a message: its path, or the name of the stream."""
    if isinstance(file, (str, os.PathLike)):
        return os.fspath(file)
    return str(getattr(file, "name", "audio stream"))


@functools.lru_cache(maxsize=4096)
def warn_once(message: str) -> None:
    """Logs a warning, once in a process: files are decoded again in every epoch."""
    logging.warning("%s", message)


def _open(file: BinaryIO, name: str, size: int, stack: contextlib.ExitStack) -> Decoder:
    try:
        sound = stack.enter_context(_Sound(_handle(file), closefd=False))
    except Exception as error:
        file.seek(0)
        mended = _with_end_mark(file, size)
        if mended is None:
            return _open_other(file, name, error, stack)
        sound = stack.enter_context(_Sound(_Memory(mended), closefd=False))
    kind, log = sound.format, sound.extra_info
    stated, least = sound.frames, 0
    if kind == "MP3" and (stream := _without_length(file, size)):
        least = 0 if stream is file else stated  # a length that is too small counts, too
        stated = None
        sound = stack.enter_context(_piped(stream))
    elif mended := _mended(file, size, kind, stated, log):
        if kind == "OGG":
            warn_once(f"{name}: its last page has no end mark; it is used as far as it goes")
        sound = stack.enter_context(_Sound(_Memory(mended), closefd=False))
        stated, log = sound.frames, sound.extra_info
    elif kind == "NIST" and (count := re.search(rb"sample_count -i (\d+)", _head(file))):
        stated = max(stated, int(count[1][:12]))
    return _SoundDecoder(sound, name, size, file, kind, log, stated, least)


# ---- soundfile ---------------------------------------------------------------------------------


class _Sound(soundfile.SoundFile):
    """Reads on until the decoder ends.

    SoundFile itself stops at the length of the header, and seeks after every read, which GSM and
    FLAC of unknown length do not survive.
    """

    def seekable(self) -> bool:
        return False


class _SoundDecoder:
    """What libsndfile reads."""

    def __init__(
        self,
        sound: _Sound,
        name: str,
        size: int,
        file: BinaryIO,
        kind: str,
        log: str,
        stated: int | None,
        least: int,
    ):
        self._sound, self._name, self._size, self._file = sound, name, size, file
        self._kind, self._least = kind, least
        self.rate, self.channels = sound.samplerate, sound.channels
        subtype = sound.subtype
        known = stated is not None and stated < _UNKNOWN_FRAMES and (stated or kind != "FLAC")
        self.frames = stated if known else None
        self.floating = subtype not in _INTEGER
        self.seeks = known and subtype != "GSM610"
        if _TROUBLE.search(log):
            self._judge_log(log)
        elif kind in ("AU", "CAF") and self.frames:
            audio = _WIDTHS.get(subtype, size) * self.channels * self.frames
            self._judge_rest(size - audio, 4 * _TAIL, self.frames)

    def _judge_log(self, log: str) -> None:
        if _CUT_OGG.search(log):
            raise AudioError(f"{self._name}: truncated, the file ends before its audio does")
        if _HOLE.search(log):
            raise AudioError(f"{self._name}: damaged, a part of its audio is lost")
        for promised, actual in _CUT_CHUNK.findall(log):
            if not int(actual) < int(promised) < _UNKNOWN_SIZE:
                continue
            if int(promised) > self._size:
                raise AudioError(f"{self._name}: truncated, the file ends before its audio does")
            warn_once(f"{self._name}: its header counts itself as audio; it is used to its end")
        for position in map(int, _NO_CHUNK.findall(log)):
            # As many bytes as a tenth of a second has, by those before them.
            most = SLACK * self.rate * position / max(self.frames or 0, 1)
            self._judge_rest(self._size - position, most, self.frames or 0)

    def _judge_rest(self, left: int, most: float, frames: int) -> None:
        """Raises for audio that its header does not count, and that would be lost."""
        if left > most:
            raise AudioError(
                f"{self._name}: {left:,} bytes follow the end of its audio, after "
                f"{frames / self.rate:.2f} s; it is several recordings in one file, or its header "
                "is damaged: split or convert it"
            )

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        sound, most = self._sound, max(1, _BLOCK // self.channels)
        position = 0
        if start and self.seeks:
            position = max(0, start - round(_PREROLL * self.rate))
            sound.seek(position)
        begin, skip = position, start - position
        # libsndfile itself goes no further than the length that it found.
        end = min(filter(None, (self.frames, stop)), default=None)
        while end is None or position < end:
            block = sound.read(
                most if end is None else min(most, end - position),
                dtype="float32" if self.floating else "int16",
                always_2d=True,
            )
            if not len(block):
                break
            position += len(block)
            if skip < len(block):
                yield block[skip:]
            skip = max(0, skip - len(block))
        self._judge_end(position, begin, stop)

    def _judge_end(self, position: int, begin: int, stop: int | None) -> None:
        if self._kind == "OGG":
            self._judge_log(self._sound.extra_info)
        promised = max(self.frames or 0, self._least)
        promised = promised if stop is None else min(stop, promised)
        if promised - position > SLACK * self.rate:
            raise AudioError(
                f"{self._name}: truncated, it holds {position / self.rate:.2f} s of the "
                f"{promised / self.rate:.2f} s in its header"
            )
        if stop is None and not begin and self._kind in ("FLAC", "OGG"):
            self._judge_rest(self._size - self._file.tell(), _TAIL, position)


def _handle(file: BinaryIO) -> "int | _Memory":
    """What soundfile opens: the descriptor of a file, read without Python, or the stream."""
    try:
        return file.fileno()
    except (OSError, AttributeError):
        return _Memory(file)


class _Memory:
    """A stream that stays where it is when it is asked to go before its start, as files do."""

    def __init__(self, file: BinaryIO):
        self._seek, self.read, self.tell = file.seek, file.read, file.tell
        if hasattr(file, "readinto"):
            self.readinto = file.readinto

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        with contextlib.suppress(ValueError):
            self._seek(offset, whence)


def _head(file: BinaryIO, start: int = 0) -> bytes:
    """Returns 4 KiB from `start` on; the position, which libsndfile shares, stays where it is."""
    position = file.tell()
    file.seek(start)
    head = file.read(4096)
    file.seek(position)
    return head


@contextlib.contextmanager
def _piped(file: BinaryIO) -> Iterator[_Sound]:
    """Opens a file through a pipe, where libsndfile cannot guess a length and reads to the end."""
    file.seek(0)
    source, sink = os.pipe()

    def feed() -> None:
        with open(sink, "wb", buffering=0) as out, contextlib.suppress(OSError, ValueError):
            while block := file.read(1 << 16):
                view = memoryview(block)
                while view:
                    view = view[out.write(view) :]

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    try:
        with _Sound(source, closefd=False) as sound:
            yield sound
    finally:
        os.close(source)  # ends the thread, which finds the pipe broken
        thread.join()


class _Mended:
    """A file in which some bytes are read as they should be."""

    def __init__(self, file: BinaryIO, at: int, mended: bytes):
        self._file, self._at, self._mended = file, at, mended

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int = -1) -> bytes:
        start = self._file.tell()
        block = self._file.read(count)
        first, last = max(start, self._at), min(start + len(block), self._at + len(self._mended))
        if first >= last:
            return block
        mended = self._mended[first - self._at : last - self._at]
        return block[: first - start] + mended + block[last - start :]


def _without_length(file: BinaryIO, size: int) -> BinaryIO | _Mended | None:
    """Returns an MP3 whose length only decoding tells, without a wrong one; None for another.

    The length is in a Xing, Info or VBRI frame, the first one. It is wrong where the file goes on
    behind the bytes that it counts, as after `cat a.mp3 b.mp3`.
    """
    start, head = 0, _head(file)
    if head[:3] == b"ID3" and len(head) >= 10:
        start = 10 + sum(
            (byte & 0x7F) << bits for byte, bits in zip(head[6:10], (21, 14, 7, 0), strict=True)
        )
        head = _head(file, start)
    mark = re.search(rb"Xing|Info|VBRI", head)
    if mark is None:
        return file
    at = mark.start()
    flags = head[at + 7 : at + 8]
    if mark[0] == b"VBRI" or not flags or not flags[0] & 2:  # no count of bytes
        return None
    count = head[at + 8 + 4 * (flags[0] & 1) :][:4]
    if size - start <= int.from_bytes(count) * 1.02 + _TAIL:
        return None
    return _Mended(file, start + at, bytes(4))


def _mended(file: BinaryIO, size: int, kind: str, frames: int, log: str) -> _Mended | None:
    """Returns a file with what its writer did not come to write, None where nothing is missing."""
    mended = None
    if kind in ("WAV", "WAVEX") and frames == 0:
        at = _head(file).find(b"data\0\0\0\0")  # the size of the audio
        mended = _Mended(file, at + 4, b"\xff\xff\xff\xff") if -1 < at < size - 8 else None
    elif kind == "OGG" and _NO_END_MARK.search(log):
        mended = _with_end_mark(file, size)
    if mended:
        mended.seek(0)
    return mended


def _with_end_mark(file: BinaryIO, size: int) -> _Mended | None:
    """Returns an Ogg with the mark of its last page, None where it has one or that page is cut."""
    if _head(file)[:4] != b"OggS":
        return None
    start = max(0, size - 70_000)  # a page has 65,307 bytes at most
    file.seek(start)
    tail = file.read()
    file.seek(0)
    at = tail.rfind(b"OggS")
    page = bytearray(tail[at:])
    if len(page) < 27 or len(page) != 27 + page[26] + sum(page[27 : 27 + page[26]]) or page[5] & 4:
        return None
    page[5] |= 4
    page[22:26] = bytes(4)
    page[22:26] = _ogg_checksum(page).to_bytes(4, "little")
    return _Mended(file, start + at, bytes(page))


def _ogg_checksum(page: bytes) -> int:
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value)
    checksum = 0
    for byte in page:
        checksum = (checksum << 8 & 0xFFFFFFFF) ^ table[checksum >> 24 ^ byte]
    return checksum


# ---- PyAV --------------------------------------------------------------------------------------


def _open_other(
    file: BinaryIO, name: str, error: Exception, stack: contextlib.ExitStack
) -> Decoder:
    """Opens with PyAV what soundfile refuses with `error`."""
    file.seek(0)
    head = _head(file)
    found = next((what for first, *what in _CONTAINERS if first.match(head)), None)
    if found is None and name.endswith(".gsm"):
        found = ("GSM", "gsm")
    if found is None:
        raise AudioError(f"{name}: not audio that soundfile can read ({_reason(error)})") from error
    title, demuxer = found
    try:
        import av
    except ModuleNotFoundError:
        raise UnsupportedError(
            f"{name}: {title} is read by PyAV, which is not installed: convert it to FLAC or WAV, "
            "or pip install 'speech_jax[av]'"
        ) from None
    try:
        # Under one name, so that no content makes FFmpeg open other files.
        container = stack.enter_context(av.open(file, format=demuxer, metadata_errors="ignore"))
    except Exception as error:
        raise UnsupportedError(
            f"{name}: damaged or no {title} that PyAV can read ({_reason(error)}): restore it, or "
            "convert it to FLAC or WAV"
        ) from error
    if not container.streams.audio:
        raise AudioError(f"{name}: {title} without sound")
    return _AvDecoder(container, name, av)


class _AvDecoder:
    """What FFmpeg reads, from the first sound stream, in order."""

    # Lengths in headers leave out the padding of the last frame, or count what is not heard.
    floating, seeks, frames = True, False, None

    def __init__(self, container, name: str, av):
        self._container, self._name = container, name
        self._stream = container.streams.audio[0]
        self._resampler = av.AudioResampler(format="flt")  # another layout, not another rate
        self.rate, self.channels = self._stream.rate, self._stream.channels
        seconds = float((self._stream.duration or 0) * self._stream.time_base)
        self._promised = seconds
        if container.duration and len(container.streams) == 1:
            self._promised = max(seconds, container.duration / av.time_base)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        position = 0
        for frame in self._container.decode(self._stream):
            for piece in self._resampler.resample(frame):
                block = piece.to_ndarray().reshape(-1, self.channels)
                position += len(block)
                yield block
        if self._promised - position / self.rate > 1.3 * SLACK:
            raise AudioError(
                f"{self._name}: truncated, it holds {position / self.rate:.2f} s of the "
                f"{self._promised:.2f} s in its header"
            )


def _reason(error: Exception) -> str:
    """Returns what a library says went wrong, in one line, without a prefix of soundfile's."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join((str(text) or type(error).__name__).split()).rstrip(".")[:200]
