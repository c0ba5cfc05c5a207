"""Utterances on a page: a player, a spectrogram, and the words where they were heard.

Both are bytes in the page itself, so that it plays from a file and asks nobody for anything.
"""

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import soundfile

from speech_jax.data import audio
from speech_jax.data.pipeline import Corpus
from speech_jax.errors import UserError
from speech_jax.evaluators import page, words
from speech_jax.evaluators.page import Html, element
from speech_jax.ops import features

RATE = 16_000  # every browser plays it, whatever the model hears
# So much of an utterance is heard, so that one long recording does not fill the page.
_LONGEST_SECONDS = 60.0


def player(samples: np.ndarray) -> Html:
    """A player of int16 [T] at 16 kHz."""
    return element(
        "audio", controls=True, preload="metadata", src=_data("audio/mpeg", _mp3(samples))
    )


class Media:
    """Makes players and spectrograms, until they take as many bytes as they may."""

    def __init__(self, budget: int):
        self._left = budget

    def of(self, corpus: Corpus, index: int, line: Mapping[str, Any]) -> Html:
        """The player and the spectrogram of an utterance, with the times of its words."""
        if self._left <= 0:
            return element("p", "There is no room left on this page for its audio.", class_="note")
        try:
            samples = audio.decode(corpus.source.open(index), RATE)
        except UserError as error:
            return element("p", f"Its audio cannot be shown: {error}", class_="note")
        note = ""
        if len(samples) > _LONGEST_SECONDS * RATE:
            note = f"The first {_LONGEST_SECONDS:.0f} s of {len(samples) / RATE:.0f} s."
            samples = samples[: round(_LONGEST_SECONDS * RATE)]
        sound, picture = _data("audio/mpeg", _mp3(samples)), _data("image/webp", _picture(samples))
        self._left -= len(sound) + len(picture)
        seconds = len(samples) / RATE
        seen = element(
            "div",
            element("img", src=picture, alt="spectrogram"),
            element("span", class_="head", aria_hidden="true"),
            _times(line, seconds),
            class_="seen",
            style=f"width: {130 * seconds:.0f}px",
        )
        return element(
            "div",
            element("audio", controls=True, preload="metadata", src=sound),
            page.scrolled(seen),
            element("p", note, class_="note") if note else "",
            class_="sound",
            data_seconds=round(seconds, 3),
        )


def _times(line: Mapping[str, Any], seconds: float) -> Html:
    """The words of the hypothesis where they were heard, and a scale of seconds."""
    percent = lambda at: f"{100 * min(at / seconds, 1.0):.2f}%"
    found = []
    heard = [word for word in line.get("words") or [] if word[1] < seconds]
    pairs = words.align(str(line.get("reference", "")).split(), [word[0] for word in heard])
    right = [a == b for a, b in pairs if b is not None]
    for (text, start, end, confidence), good in zip(heard, right, strict=True):
        end = min(end, seconds)
        sure = "" if confidence is None else f", confidence {confidence:.2f}"
        found.append(
            element(
                "button",
                element("bdi", text),
                type="button",
                class_=None if good else "wrong",
                data_at=round(float(start), 3),
                title=f"{start:.2f} to {end:.2f} s{sure}",
                style=f"left: {percent(start)}; width: {percent(end - start)}",
            )
        )
    scale = (
        element("span", f"{second} s", style=f"left: {percent(second)}")
        for second in range(math.ceil(seconds))
    )
    timed = element("div", *found, class_="times") if found else ""
    return page.join([element("div", *scale, class_="scale", aria_hidden="true"), timed])


def _mp3(samples: np.ndarray) -> bytes:
    """About 4 kB a second; every browser plays MP3, which cannot be said of Ogg."""
    file = io.BytesIO()
    soundfile.write(
        file, samples, RATE, format="MP3", subtype="MPEG_LAYER_III",
        bitrate_mode="VARIABLE", compression_level=0.7,
    )  # fmt: skip
    return file.getvalue()


def _picture(samples: np.ndarray, bands: int = 64, window: int = 400) -> bytes:
    """A log-mel spectrogram of int16 [T], 60 dB deep, as WebP."""
    from matplotlib import image  # takes half a second, and training needs none

    hop = max(RATE // 100, math.ceil(len(samples) / 1500))
    padded = np.pad(samples.astype(np.float32) / 32768, (window // 2, window))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(samples) : hop]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(window), 512)))
    mels = power @ features.mel_filters(bands, 512, RATE, 20.0, RATE / 2)
    decibel = 10 * np.log10(np.maximum(mels, 1e-10)).T
    top = decibel.max()
    file = io.BytesIO()
    image.imsave(
        file, decibel, vmin=top - 60, vmax=top, cmap="magma", origin="lower", format="webp",
        pil_kwargs={"quality": 50},
    )  # fmt: skip
    return file.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
