"""From logits to words: the one object that evaluation, transcription and export decode with."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax import files
from speech_jax.decoding import beam, ctc, fusion, generate, ngram
from speech_jax.decoding.confidence import calibrated
from speech_jax.decoding.generate import Texts
from speech_jax.decoding.lexicon import Lexicon
from speech_jax.decoding.words import Decoded, Word, timed
from speech_jax.errors import UserError
from speech_jax.ops import masking

# Decoder of logits of CTC -> the settings that it uses; some use those of _OF_LM as well.
OF_CTC: dict[str, tuple[str, ...]] = {
    "greedy": (),
    "beam": ("width", "labels", "skip", "nbest"),
    "lexicon": ("width", "labels", "nbest", "bonus", "lexicon"),
}
_OF_LM = ("lm", "lm_weight", "bonus")
# The same of searches that a task does itself, of more than logits.
OF_TASKS: dict[str, tuple[str, ...]] = {
    "attention": ("width", "nbest", "length_penalty"),
    "joint": ("width", "nbest", "length_penalty", "ctc_weight"),
    "rescore": ("width", "labels", "nbest", "ctc_weight"),
    "transducer": (),
    "transducer_beam": ("width", "labels", "nbest"),
}
DECODERS = OF_CTC | OF_TASKS
# Those that a language model of labels is part of, on the device.
_FUSED = ("beam", "transducer_beam")


class DecoderError(UserError):
    """Settings of a decoder that cannot work; the message names the setting."""


class Tokenizer(Protocol):
    """What a decoder asks of a tokenizer (data/text.py)."""

    @property
    def spellings(self) -> tuple[str, ...]: ...

    def decode(self, ids: Any) -> str: ...


class Transcript(Protocol):
    """What a decoder asks of a transcript (data/parts/transcript.py)."""

    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """How logits become words; the section `decoder` of a configuration.

    Attributes:
      name: 'greedy', the best label of each frame; 'beam', CTC prefix beam search on the device,
        with n-grams of the labels if there is an `lm`; 'lexicon', beam search over known words with
        n-grams of words, on the host (flashlight-text). A model that writes with an attention
        decoder (tasks/attend.py) also has 'attention', 'joint' (with CTC, in one pass) and
        'rescore' (the `width` best of CTC, put in order by both); one that translates has
        'attention' alone. A transducer (tasks/transduce.py) also has 'transducer', the best label
        of each step, and 'transducer_beam', with n-grams of the labels if there is an `lm`.
      width: hypotheses that are kept after each frame, or each label that is written.
      labels: the most probable labels of a frame that extend a hypothesis; of 'transducer_beam'
        with an `lm`.
      skip: a frame whose blank is more probable than this extends no hypothesis ('beam'); 1: none.
      nbest: readings that are given, `width` at most.
      lm: an ARPA file, plain or .gz, of labels for 'beam' and 'transducer_beam', of words for
        'lexicon'; empty: none.
      lm_weight: what the language model's log probabilities are multiplied by.
      bonus: nats for each label ('beam', 'transducer_beam', with an `lm`) or word ('lexicon').
      lexicon: a file of the words that 'lexicon' knows; empty: those of `lm`.
      ctc_weight: of CTC in 'joint' and 'rescore'; the attention decoder has the rest.
      length_penalty: of 'attention' and 'joint'; more of it makes longer texts (generate.beam).
      calibration: (scale, offset) of confidences, see decoding/confidence.py.
    """

    name: str = "greedy"
    width: int = 16
    labels: int = 32
    skip: float = 0.9999
    nbest: int = 1
    lm: str = ""
    lm_weight: float = 0.5
    bonus: float = 0.0
    lexicon: str = ""
    ctc_weight: float = 0.3
    length_penalty: float = 0.0
    calibration: tuple[float, float] = (1.0, 0.0)

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "Settings":
        """Those of a section, in which None stands for the default; DecoderError for others."""
        known = [field.name for field in dataclasses.fields(cls)]
        given = {key: value for key, value in section.items() if value is not None}
        for key in given:
            if key not in known:
                raise DecoderError(f"config.decoder has no {key!r}; it has {', '.join(known)}")
        return cls(**given)

    def __post_init__(self) -> None:
        demands = {
            "name": (self.name in DECODERS, f"one of {', '.join(DECODERS)}"),
            "width": (1 <= self.width <= 1024, "1 to 1024"),
            "labels": (self.labels >= 1, "at least 1"),
            "skip": (0.5 <= self.skip <= 1, "in [0.5, 1]"),
            "nbest": (1 <= self.nbest <= self.width, f"1 to config.decoder.width={self.width}"),
            "lm_weight": (math.isfinite(self.lm_weight) and self.lm_weight >= 0, "at least 0"),
            "bonus": (math.isfinite(self.bonus), "a finite number"),
            "ctc_weight": (0 <= self.ctc_weight <= 1, "in [0, 1]"),
            "length_penalty": (0 <= self.length_penalty <= 10, "in [0, 10]"),
            "calibration": (
                len(self.calibration) == 2
                and all(isinstance(x, int | float) and math.isfinite(x) for x in self.calibration),
                "a scale and an offset, both finite",
            ),
        }
        for key, (holds, demand) in demands.items():
            if not holds:
                raise DecoderError(f"config.decoder.{key}={getattr(self, key)!r} must be {demand}")
        if self.name == "lexicon" and not (self.lm or self.lexicon):
            raise DecoderError(
                "config.decoder.name='lexicon' needs words: name an ARPA file of them as "
                "config.decoder.lm, or a list of them as config.decoder.lexicon"
            )

    def check_files(self) -> None:
        """DecoderError where a file that is used is not there."""
        for key, path in self.used().items():
            if key in ("lm", "lexicon") and not files.expand(path).is_file():
                raise DecoderError(
                    f"config.decoder.{key}={path!r} is no file: bring it back, name another one "
                    "or set config.decoder.name='greedy'"
                )

    def heeded(self) -> list[str]:
        """The names of the settings that can change what this decoder finds."""
        of_lm = _OF_LM if self.name in (*_FUSED, "lexicon") else ()
        return [*dict.fromkeys(("name", *DECODERS[self.name], *of_lm, "calibration"))]

    def used(self) -> dict[str, Any]:
        """The settings that the decoder uses, by name, as JSON holds them."""
        idle = set() if self.lm else {*_OF_LM} - {*DECODERS[self.name]}
        idle |= set() if self.lexicon else {"lexicon"}
        found = {name: getattr(self, name) for name in self.heeded() if name not in idle}
        return found | {"calibration": list(self.calibration)}

    def __str__(self) -> str:
        """How text is decoded, in a few words."""
        used = self.used()
        name = f"{self.name} {self.width}" if "width" in used else self.name
        by = [f"{key} {files.expand(used[key]).name}" for key in ("lexicon", "lm") if key in used]
        numbers = {"lm_weight": "weight", "bonus": "bonus"}
        by += [f"{said} {used[key]:g}" for key, said in numbers.items() if key in used]
        others = {"ctc_weight": "CTC", "length_penalty": "length penalty"}
        parts = [f"{said} {used[key]:g}" for key, said in others.items() if used.get(key)]
        return ", ".join([name, *([" ".join(by)] if by else []), *parts])


class Decoder:
    """Turns logits into words. A call does it all; `search` and `read` are its two halves.

    `search` runs on the device inside somebody's jit, and gives arrays with a row an utterance;
    `read` makes words of such a row on the host.
    """

    def __init__(
        self, settings: Mapping[str, Any], transcript: Transcript, frame_seconds: float
    ) -> None:
        """Prepares a decoder; nothing is compiled yet.

        Args:
          settings: fields of `Settings`; None, or what is left out, is the default.
          transcript: the part whose tokenizer the logits' classes are of; the blank is 0.
          frame_seconds: seconds from one frame of the logits to the next.

        Raises:
          DecoderError: a setting cannot work.
        """
        self.settings = Settings.of(settings)
        self._transcript = transcript
        self.frame_seconds = frame_seconds
        self._compiled = jax.jit(self._search)

    def __call__(self, logits: Any, lengths: Any) -> list[Decoded]:
        """Decodes logits float [B, T, K] of lengths int [B] frames.

        Raises:
          LanguageModelError: the language model or the lexicon cannot be used.
        """
        return self.read_all(self._compiled, logits, lengths)

    def read_all(
        self, find: Callable[..., dict[str, jax.Array]], frames: Any, lengths: Any
    ) -> list[Decoded]:
        """The words of frames [B, T, D] of which so many are valid, int [B].

        They are padded to one of few shapes, so that few programs are compiled.

        Args:
          find: (frames, lengths, fusion) to what `search` gives, compiled.
        """
        frames, lengths = np.asarray(frames), np.asarray(lengths, np.int32)
        batch = len(frames)
        rows, longer = (_rounded(size) - size for size in frames.shape[:2])
        padded = np.pad(frames, ((0, rows), (0, longer), (0, 0))), np.pad(lengths, (0, rows))
        found = jax.device_get(find(*padded, self.fusion))
        return [
            self.read({name: array[row] for name, array in found.items()}) for row in range(batch)
        ]

    def search(self, logits: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
        """The decoding on the device: arrays by name, [B, ...] each.

        Args:
          logits: [B, T, K], not normalized; lengths: int32 [B], frames.

        Raises:
          LanguageModelError: the language model cannot be used.
          DecoderError: it is a search of more than logits, which a task does itself.
        """
        return self._search(logits, lengths, self.fusion)

    def _search(
        self, logits: jax.Array, lengths: jax.Array, tables: fusion.Fusion | None
    ) -> dict[str, jax.Array]:
        settings = self.settings
        self.check_task()
        if settings.name == "lexicon":  # the search is on the host: see `read`
            log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
            return {"log_probs": log_probs, "frames": lengths}
        if settings.name == "greedy":
            return _row(ctc.best_path(logits, lengths)) | {"frames": lengths}
        found = beam.search(
            logits,
            lengths,
            width=settings.width,
            labels=settings.labels,
            nbest=settings.nbest,
            skip=settings.skip,
            fusion=tables,
        )
        best = ctc.aligned(logits, lengths, found.labels[:, 0], found.count[:, 0])
        others = {"nbest": found.labels, "nbest_length": found.count, "nbest_score": found.score}
        row = _row(best) | {"frames": lengths, "score": found.score[:, 0]}
        return row | (others if settings.nbest > 1 else {})

    def check_task(self, searches: Collection[str] = tuple(OF_CTC)) -> None:
        """DecoderError for a search that is none of a task's `searches`."""
        if self.settings.name not in searches:
            raise DecoderError(
                f"config.decoder.name={self.settings.name!r} is a search of another kind of model: "
                f"with this one it can be {', '.join(searches)}"
            )

    def written(
        self, texts: Texts, frames: jax.Array, logits: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """What `search` gives, of texts that a task has found, and `ended`, bool [B].

        Labels are where CTC aligns them best; where there is no CTC, or the text does not fit, they
        are spread evenly over the frames.

        Args:
          texts: labels [B, n, T]; frames: int32 [B]; logits: of CTC, [B, T, K].
        """
        labels, count, score = texts.labels[:, 0], texts.count[:, 0], texts.score[:, 0]
        inside = masking.length_mask(count, labels.shape[1])
        place = jnp.arange(labels.shape[1], dtype=jnp.int32)[None]
        starts = place * frames[:, None] // jnp.maximum(count, 1)[:, None]
        penalty = 0.0 if self.settings.name == "rescore" else self.settings.length_penalty
        ends, sure = starts + 1, generate.confidence(texts, penalty)[:, None]
        if logits is not None:
            best = ctc.aligned(logits, frames, labels, count)
            placed = best.starts >= 0
            starts, ends = (
                jnp.where(placed, best.starts, starts),
                jnp.where(placed, best.ends, ends),
            )
            sure = jnp.where(placed, best.sure, sure)
        found = {
            "labels": labels,
            "labels_length": count,
            "starts": jnp.where(inside, starts, -1),
            "ends": jnp.where(inside, ends, -1),
            "sure": jnp.where(inside, sure, 0),
            "score": score,
            "frames": frames,
            "ended": texts.ended[:, 0],
        }
        others = {"nbest": texts.labels, "nbest_length": texts.count, "nbest_score": texts.score}
        return found | (others if self.settings.nbest > 1 else {})

    def weighed(self, lm_weight: float, bonus: float) -> "Decoder":
        """The same decoder with other weights; on the device nothing is compiled for it."""
        other = copy.copy(self)
        other.settings = dataclasses.replace(self.settings, lm_weight=lm_weight, bonus=bonus)
        other.__dict__.pop("_lexicon", None)
        if self.fusion:
            other.__dict__["fusion"] = self.fusion.weighed(lm_weight, bonus)
        return other

    def calibrated_by(self, scale: float, offset: float) -> "Decoder":
        """The same decoder with another calibration of its confidences."""
        other = copy.copy(self)
        other.settings = dataclasses.replace(self.settings, calibration=(scale, offset))
        return other

    def read(self, row: Mapping[str, np.ndarray]) -> Decoded:
        """The words of a row of what `search` gave."""
        if self.settings.name == "lexicon":
            return self._read_lexicon(row["log_probs"][: int(row["frames"])])
        count = int(row["labels_length"])
        labels = row["labels"][:count]
        text, score = self._text(labels), float(row["score"])
        others = alternatives(row, text, score, self._text)
        aligned = (row[name][:count] for name in ("starts", "ends", "sure"))
        words = self._words(labels, *aligned, int(row["frames"]))
        return Decoded(text, words, score, others)

    def _read_lexicon(self, log_probs: np.ndarray) -> Decoded:
        found = self._lexicon(log_probs)
        if not found:
            return Decoded("", (), 0.0, (("", 0.0),))
        best = found[0]
        first = np.flatnonzero(np.diff(best.path, prepend=0) != 0)
        ends = np.append(first[1:], len(best.path))[best.path[first] != 0]
        starts = first[best.path[first] != 0]
        sure = [
            np.exp(log_probs[start:end, best.path[start]].max())
            for start, end in zip(starts, ends, strict=True)
        ]
        words = self._words(best.path[starts], starts, ends, np.asarray(sure), len(log_probs))
        alternatives = tuple((" ".join(one.words), one.score) for one in found)
        return Decoded(alternatives[0][0], words, best.score, alternatives)

    def _words(
        self,
        labels: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        sure: np.ndarray,
        frames: int,
    ) -> tuple[Word, ...]:
        """Words of labels that are in frames [start, end), each [N], of so many in all."""
        spoken = timed(labels, starts, ends, sure, self._spellings, self.frame_seconds, frames)
        if not spoken:
            return ()
        texts, begins, stops, evidence = zip(*spoken, strict=True)
        sure_of = calibrated(np.asarray(evidence), *self.settings.calibration).tolist()
        return tuple(map(Word, texts, begins, stops, sure_of))

    def _text(self, labels: np.ndarray) -> str:
        return " ".join(self._transcript.tokenizer.decode(labels.tolist()).split())

    @functools.cached_property
    def _spellings(self) -> tuple[str, ...]:
        return self._transcript.tokenizer.spellings

    @functools.cached_property
    def fusion(self) -> fusion.Fusion | None:
        """The language model on the device; None without one."""
        settings = self.settings
        if settings.name not in _FUSED or not settings.lm:
            return None
        try:
            known = ngram.read(settings.lm)
            with jax.ensure_compile_time_eval():  # it may be asked for first inside a jit
                return fusion.make(known, self._spellings, settings.lm_weight, settings.bonus)
        except UserError as error:
            raise DecoderError(f"config.decoder.lm={settings.lm!r}: {error}") from error

    @functools.cached_property
    def _lexicon(self) -> Lexicon:
        settings = self.settings
        return Lexicon(
            self._transcript.tokenizer,
            width=settings.width,
            labels=settings.labels,
            nbest=settings.nbest,
            lm=settings.lm,
            lm_weight=settings.lm_weight,
            bonus=settings.bonus,
            words=settings.lexicon,
        )


def alternatives(
    row: Mapping[str, np.ndarray], text: str, score: float, read: Callable[[np.ndarray], str]
) -> tuple[tuple[str, float], ...]:
    """(text, score) of the best readings in a row of what a search gave; `text` is the best one.

    `read` makes a text of labels. Two that differ in spaces alone are one.
    """
    found = {text: score}
    others = (row.get(f"nbest{of}", ()) for of in ("", "_length", "_score"))
    for labels, count, score_of in zip(*others, strict=True):
        if score_of > beam.NEVER / 2:
            found.setdefault(read(labels[:count]), float(score_of))
    return tuple(found.items())


def _row(path: ctc.Path) -> dict[str, jax.Array]:
    return {
        "labels": path.labels,
        "labels_length": path.count,
        "starts": path.starts,
        "ends": path.ends,
        "sure": path.sure,
        "score": path.score,
    }


def _rounded(size: int) -> int:
    """The next number of which there are few: 4 to 8 times a power of two."""
    step = 1 << max(0, max(size, 1).bit_length() - 3)
    return -(-max(size, 1) // step) * step
