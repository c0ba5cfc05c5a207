"""A trained model that is given recordings and says what it hears, and when.

A recording is read block by block, cut into pieces at its pauses (deploy/pieces.py), and these
into chunks that a model hears at once. Chunks of all recordings at hand are heard together, by
length, in few static shapes; the logits of a piece are put together by time and decoded.
"""

import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from speech_jax.data import audio
from speech_jax.decoding.decoder import Decoder
from speech_jax.decoding.words import Decoded, Word
from speech_jax.deploy import pieces
from speech_jax.deploy.acoustic import Acoustic
from speech_jax.deploy.inputs import File, TranscriptionError, open_recording, padded
from speech_jax.errors import UserError

# Lengths that a chunk may have, in seconds, and the largest that is the default: attention takes
# memory with the square of the length.
CHUNKS, _LARGEST_DEFAULT = (5.0, 300.0), 30.0
# Audio of a batch, padding included, in seconds: enough to keep the device busy.
_BATCH_SECONDS = {"cpu": 60.0}
_BATCH_SECONDS_ELSEWHERE = 600.0
# So much audio is read before it is heard, in batches.
_POOL_BATCHES = 6
# Pieces that are decoded together.
_DECODED_TOGETHER = 16


@dataclasses.dataclass(frozen=True)
class Segment:
    """What was said between two pauses, from `start` to `end` seconds.

    Attributes:
      words: its words; their times are seconds from the start of the recording.
      alternatives: (text, natural logarithm of its score) of its n best readings, the best first.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...]
    alternatives: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Transcription:
    """What was said in a recording that lasts `seconds`.

    Attributes:
      segments: those in which there is a word, in order.
      trouble: why nothing could be heard in it (digital silence, too short); otherwise empty.
    """

    text: str
    seconds: float
    segments: tuple[Segment, ...] = ()
    trouble: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def words(self) -> tuple[Word, ...]:
        """All words, with their seconds from the start of the recording and their confidence."""
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def alternatives(self) -> tuple[tuple[str, float], ...]:
        """(text, natural logarithm of its score) of the n best readings, the best first."""
        most = max((len(segment.alternatives) for segment in self.segments), default=1)
        best = [((), 0.0)]
        for segment in self.segments:
            longer = (
                ((*texts, text), score + more)
                for (texts, score), (text, more) in itertools.product(best, segment.alternatives)
            )
            best = heapq.nlargest(most, longer, key=lambda reading: reading[1])
        return tuple((" ".join(filter(None, texts)), score) for texts, score in best)


class Model:
    """A trained model, ready for use. `speech_jax.load` makes one.

    Attributes:
      acoustic: what makes logits of samples.
    """

    def __init__(
        self,
        acoustic: Acoustic,
        *,
        chunk_seconds: float | None = None,
        decoder: Mapping[str, Any] | None = None,
    ):
        """A model around `acoustic`.

        Args:
          chunk_seconds: the most audio that the acoustic model is given at once, 5 to 300
            seconds; recordings of any length are cut into such chunks, and their text hardly
            depends on it. Less takes less memory. By default, the longest utterance of its
            training, within 10 and 30 seconds.
          decoder: settings that differ from those that the model came with, such as
            {"name": "beam", "width": 32, "nbest": 5} or {"name": "beam", "lm": "en.arpa",
            "lm_weight": 0.6}; decoding/decoder.py, Settings, lists them all. Of a model that
            translates they are of its translations; what was said is then the best path of CTC.

        Raises:
          UserError: a setting that cannot work.
        """
        self.acoustic = acoustic
        if chunk_seconds is None:
            longest = max(acoustic.longest_seconds, pieces.LONGEST)
            chunk_seconds = min(longest, _LARGEST_DEFAULT)
        if not CHUNKS[0] <= chunk_seconds <= CHUNKS[1]:
            raise TranscriptionError(
                f"chunk_seconds={chunk_seconds:g} must be {CHUNKS[0]:g} to {CHUNKS[1]:g}"
            )
        self._chunk_seconds = chunk_seconds
        self._frame = round(acoustic.frame_seconds * acoustic.sample_rate)
        settings = {**acoustic.decoder, **(decoder or {})}
        if self.translates:  # what was said is the best path of CTC
            self._translation, settings = acoustic.translation(settings), {}
        self._decoder = Decoder(settings, acoustic.transcript, acoustic.frame_seconds)
        self._decoder.settings.check_files()
        search = getattr(acoustic, "search", None)
        self._search = search(settings) if search and not self.translates else None
        if not self._search:
            self._decoder.check_task()
        platform = jax.default_backend()
        self._batch_seconds = _BATCH_SECONDS.get(platform, _BATCH_SECONDS_ELSEWHERE)

    @property
    def sample_rate(self) -> int:
        """Samples a second of the audio that the model hears."""
        return self.acoustic.sample_rate

    def transcribe(
        self, recording: File | np.ndarray, sample_rate: int | None = None
    ) -> Transcription:
        """Writes down what is said in a recording of any length.

        Args:
          recording: an audio file, or an open one, of any rate and number of channels; or samples
            [T] or, with channels, [T, C]: floats within -1 and 1, or int16.
          sample_rate: of samples that are given as an array; by default that of the model.

        Raises:
          AudioError: the file cannot be read.
          TranscriptionError: the array is not audio, or the model writes translations alone.
        """
        self._check_transcribes()
        return self._one(recording, sample_rate, self._hear)

    def translate(
        self, recording: File | np.ndarray, sample_rate: int | None = None
    ) -> Transcription:
        """Writes down in another language what is said in a recording of any length.

        It takes what `transcribe` takes. Each piece between two pauses is translated by itself; the
        times of words within one are a guess.

        Raises:
          AudioError: the file cannot be read.
          TranscriptionError: the array is not audio, or the model does not translate.
        """
        return self._one(recording, sample_rate, self._translate)

    @property
    def translates(self) -> bool:
        """Whether `translate` can be used."""
        return getattr(self.acoustic, "target", None) is not None

    def _check_transcribes(self) -> None:
        if not getattr(self.acoustic, "transcribes", True):
            raise TranscriptionError(
                "this model writes translations and has not learned what was said: use translate"
            )

    def _one(self, recording: File | np.ndarray, sample_rate: int | None, hear) -> Transcription:
        opened = open_recording(recording, sample_rate, self.sample_rate)
        found = next(self._transcribe([opened], lambda files, seconds: None, hear))
        if isinstance(found, UserError):
            raise found
        return found

    def translate_all(
        self,
        recordings: Iterable[File],
        progress: Callable[[float, float], None] = lambda files, seconds: None,
    ) -> Iterator[Transcription | UserError]:
        """As `transcribe_all`, but in another language."""
        opened = (open_recording(file, None, self.sample_rate) for file in recordings)
        return self._transcribe(opened, progress, self._translate)

    def transcribe_all(
        self,
        recordings: Iterable[File],
        progress: Callable[[float, float], None] = lambda files, seconds: None,
    ) -> Iterator[Transcription | UserError]:
        """Transcribes files together, which is faster than one by one, and gives the same texts.

        Yields what `transcribe` returns or raises for each, in their order, as it becomes ready.
        `progress` is told how many files and how many seconds of audio were read.
        """
        self._check_transcribes()
        opened = (open_recording(file, None, self.sample_rate) for file in recordings)
        return self._transcribe(opened, progress, self._hear)

    def classify(self, *_: Any, **__: Any) -> None:
        """Raises TranscriptionError: a recognizer names no classes."""
        raise TranscriptionError(
            "this model writes down what is said and names no classes: use transcribe, or load one "
            "that was trained to classify"
        )

    def _transcribe(
        self,
        opened: Iterable[tuple[str, Any]],
        progress: Callable[[float, float], None],
        hear: "Callable[[list[_Piece]], None]",
    ) -> Iterator[Transcription | UserError]:
        """What is said in each recording, which `opened` gives as `open_recording` does.

        `hear` gives pieces their text, and their memory back.
        """
        waiting: collections.deque[_Recording] = collections.deque()
        pool: list[_Piece] = []
        most = _POOL_BATCHES * self._batch_seconds * self.sample_rate
        before = 0.0  # seconds of the recordings before
        for number, (name, opener) in enumerate(opened):
            recording = _Recording(name)
            waiting.append(recording)
            for share in self._read(recording, opener, pool):
                if sum(len(piece.samples) for piece in pool) >= most:
                    hear(pool)
                    pool.clear()
                    yield from self._ready(waiting)
                progress(number + share, before + recording.samples / self.sample_rate)
            before += recording.samples / self.sample_rate
            progress(number + 1, before)
        hear(pool)
        yield from self._ready(waiting)

    def _read(self, recording: "_Recording", opener: Any, pool: "list[_Piece]") -> Iterator[float]:
        """Adds the pieces of a recording to the pool; yields what share of it has been read."""
        try:
            with opener as (blocks, seconds):
                for piece in pieces.cut(
                    recording.counted(blocks), self.sample_rate, self.acoustic.longest_seconds
                ):
                    recording.pieces.append(_Piece(*piece))
                    pool.append(recording.pieces[-1])
                    yield min(1.0, recording.samples / self.sample_rate / (seconds or math.inf))
            if not recording.samples:
                raise audio.AudioError(f"{recording.name}: holds no samples")
        except UserError as error:
            recording.error = error
        recording.is_read = True

    def _ready(
        self, waiting: "collections.deque[_Recording]"
    ) -> Iterator[Transcription | UserError]:
        """Takes off the front of `waiting` what is complete."""
        while waiting and waiting[0].is_ready:
            recording = waiting.popleft()
            yield recording.error or recording.transcription(self.sample_rate, self._frame)

    def _hear(self, pool: "list[_Piece]") -> None:
        """Decodes pieces, and gives the memory of their samples back."""
        if self._search:
            self._by_pieces(pool, self._read_all)
        else:
            self._listen(pool)
        for piece in pool:
            piece.samples, piece.logits = None, []

    def _translate(self, pool: "list[_Piece]") -> None:
        """Translates pieces, and gives the memory of their samples back."""
        if not self.translates:
            raise TranscriptionError(
                "this model does not translate: use transcribe, or load the workdir or the folder "
                "of one that was trained with config.task.name='translate' (an exported file "
                "leaves the translations behind)"
            )
        self._by_pieces(pool, self._translation)
        for piece in pool:
            piece.samples = None

    def _read_all(self, samples: np.ndarray, lengths: np.ndarray) -> list[Decoded]:
        """What the model's own search finds in recordings int16 [B, S] of lengths [B]."""
        found = self._search(samples, lengths)
        rows = ({name: of[row] for name, of in found.items()} for row in range(len(lengths)))
        return [self._decoder.read(row) for row in rows]

    def _by_pieces(
        self,
        pool: "list[_Piece]",
        decode: Callable[[np.ndarray, np.ndarray], Sequence[Decoded]],
    ) -> None:
        """Gives pieces what `decode` makes of them, each as a whole, in batches by length."""
        rows = collections.defaultdict(list)
        for piece in pool:
            if self.acoustic.frames(len(piece.samples)):
                rows[padded(len(piece.samples), self.sample_rate)].append(piece)
        for size, members in sorted(rows.items()):
            full = max(1, int(self._batch_seconds * self.sample_rate / size))
            for some, count in _batches(members, full):
                samples, lengths = np.zeros((count, size), np.int16), np.zeros(count, np.int32)
                for row, piece in enumerate(some):
                    samples[row, : len(piece.samples)] = piece.samples
                    lengths[row] = len(piece.samples)
                for piece, decoded in zip(some, decode(samples, lengths), strict=False):
                    piece.decoded = decoded

    def _listen(self, pool: "list[_Piece]") -> None:
        """Decodes the logits of pieces, of which a model hears a chunk at a time."""
        rows = collections.defaultdict(list)
        for piece in pool:
            for chunk in pieces.chunks(
                len(piece.samples), self._chunk_seconds, self.sample_rate, self._frame
            ):
                place = len(piece.logits)
                piece.logits.append(None)
                rows[padded(chunk.stop - chunk.start, self.sample_rate)].append(
                    (piece, place, chunk)
                )
        for size, members in sorted(rows.items()):
            full = max(1, int(self._batch_seconds * self.sample_rate / size))
            for some, count in _batches(members, full):
                self._hear_chunks(some, (count, size))
        spoken = sorted(
            (piece for piece in pool if sum(map(len, piece.logits))),
            key=lambda piece: sum(map(len, piece.logits)),
        )
        for some, count in _batches(spoken, _DECODED_TOGETHER):
            self._decode(some, count)

    def _hear_chunks(
        self, members: "list[tuple[_Piece, int, pieces.Chunk]]", shape: tuple[int, int]
    ) -> None:
        """Gives pieces the logits of chunks, heard as a batch of the shape (rows, samples)."""
        samples, lengths = np.zeros(shape, np.int16), np.zeros(shape[0], np.int32)
        for row, (piece, _, chunk) in enumerate(members):
            part = piece.samples[chunk.start : chunk.stop]
            samples[row, : len(part)], lengths[row] = part, len(part)
        logits, frames = self.acoustic.logits(samples, lengths)  # [B, T, K], [B]
        for row, (piece, place, chunk) in enumerate(members):
            last = frames[row] if chunk.last is None else chunk.last
            piece.logits[place] = logits[row, chunk.first : last].copy()

    def _decode(self, members: "list[_Piece]", rows: int) -> None:
        whole = [np.concatenate(piece.logits) for piece in members]
        lengths = np.zeros(rows, np.int32)
        lengths[: len(whole)] = [len(logits) for logits in whole]
        batch = np.zeros((rows, lengths.max(), whole[0].shape[1]), np.float32)  # [B, T, K]
        for row, logits in enumerate(whole):
            batch[row, : len(logits)] = logits
        for piece, decoded in zip(members, self._decoder(batch, lengths), strict=False):
            piece.decoded = decoded


@dataclasses.dataclass(eq=False)
class _Piece:
    """A piece of a recording on its way from samples to words."""

    start: int
    samples: np.ndarray | None
    logits: list[np.ndarray | None] = dataclasses.field(default_factory=list)  # of its chunks
    decoded: Decoded | None = None


@dataclasses.dataclass(eq=False)
class _Recording:
    """A recording on its way."""

    name: str
    pieces: list[_Piece] = dataclasses.field(default_factory=list)
    samples: int = 0
    is_read: bool = False
    error: UserError | None = None

    @property
    def is_ready(self) -> bool:
        return self.is_read and all(piece.samples is None for piece in self.pieces)

    def counted(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            self.samples += len(block)
            yield block

    def transcription(self, rate: int, frame: int) -> Transcription:
        segments = []
        for piece in self.pieces:
            if piece.decoded is not None and piece.decoded.text:
                segments.append(_segment(piece.decoded, piece.start / rate))
        seconds = self.samples / rate
        trouble = ""
        if not self.pieces:
            trouble = "digital silence, every sample is 0: check the recording"
        elif all(piece.decoded is None for piece in self.pieces):
            trouble = f"{seconds:.4f} s of sound, too short for a word: check the recording"
        text = " ".join(segment.text for segment in segments)
        return Transcription(text, seconds, tuple(segments), trouble)


def _segment(decoded: Decoded, start: float) -> Segment:
    words = tuple(
        word._replace(start=start + word.start, end=start + word.end) for word in decoded.words
    )
    return Segment(words[0].start, words[-1].end, decoded.text, words, decoded.alternatives)


def _batches(members: list, full: int) -> Iterator[tuple[list, int]]:
    """(some of the members, rows of their batch): batches are full, or of one row."""
    for start in range(0, len(members), full):
        some = members[start : start + full]
        if 4 * len(some) > full:
            yield some, full
        else:  # few for a batch, most of which would be filler rows
            yield from (([member], 1) for member in some)
