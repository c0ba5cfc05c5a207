import os
import pathlib
import random
import sys

import numpy as np
import pytest
import soundfile

from speech_jax.data import audio, sources
from speech_jax.data.sources import sentences, synthetic

_COUNT = 24  # more than two processes' worth of chunks


def _open(root, split="train", **kwargs):
    kwargs = {"utterances": _COUNT} | kwargs
    return sources.open_source("synthetic", root=root, split=split, cache=root, **kwargs)


def _bytes(source):
    return [pathlib.Path(source.open(i)).read_bytes() for i in range(len(source.utterances))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    for split in synthetic.SPLITS:
        _open(root, split)
    return root


def test_sentences_and_voices_are_in_one_split_only():
    lines = {split: list(synthetic.utterances(split, 3000, 0)) for split in synthetic.SPLITS}
    texts = {split: {line["text"] for line in rows} for split, rows in lines.items()}
    voices = {split: {line["speaker"] for line in rows} for split, rows in lines.items()}
    for some, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not texts[some] & texts[other]
        assert not voices[some] & voices[other]
        assert not set(synthetic.VARIANTS[some]) & set(synthetic.VARIANTS[other])
    assert len(texts["test"]) == len(lines["test"])
    words = {split: set(" ".join(texts[split]).split()) for split in texts}
    assert words["test"] <= words["train"]
    assert words["dev"] <= words["train"]
    assert len(words["train"]) <= 100
    assert all(text.isupper() and text.isascii() for text in texts["train"])
    accents = {voice.split("+")[0] for voice in voices["test"]}
    assert accents == {name.removeprefix("gmw/") for name in synthetic.ACCENTS["en"]}


@pytest.mark.parametrize("language", sentences.LANGUAGES)
def test_no_two_meanings_have_the_same_words(language):
    """So that a translation from or into it is right or wrong, and never a matter of choice."""
    rng = random.Random(0)
    meanings = {}
    for _ in range(20_000):
        meaning = sentences.draw(rng)
        english = sentences.say(meaning, "en")
        assert meanings.setdefault(sentences.say(meaning, language), english) == english
    words = {word for text in meanings for word in text.split()}
    assert len(words) < 160


@pytest.mark.parametrize(
    ("kind", "values", "spanish", "french", "german"),
    [
        (  # gender and number of hours
            "alarm",
            [sentences.Time(1, 21, "clock", "morning")],
            "pon una alarma para la una y veintiuno de la mañana",
            "mets une alarme pour une heure vingt et une du matin",
            "stell einen wecker auf ein uhr einundzwanzig morgens",
        ),
        (  # the half hour, and a verb whose second part is the last word
            "turn",
            ["off", "light", sentences.Time(12, 7, "half", "evening")],
            "apaga la luz a las doce y media de la noche",
            "éteins la lumière à douze heures et demie du soir",
            "schalte das licht um halb eins abends aus",
        ),
        (
            "wake",
            [0, sentences.Time(8, 7, "quarter", "")],
            "despiértame el lunes a las ocho menos cuarto",
            "réveille-moi lundi à huit heures moins le quart",
            "weck mich am montag um viertel vor acht",
        ),
        (
            "timer",
            [21, "minutes"],
            "pon un temporizador de veintiún minutos",
            "mets un minuteur de vingt et une minutes",
            "stell einen timer auf einundzwanzig minuten",
        ),
        (
            "timer",
            [31, "hours"],
            "pon un temporizador de treinta y una horas",
            "mets un minuteur de trente et une heures",
            "stell einen timer auf einunddreißig stunden",
        ),
        (  # ordinals or numbers, and the dative
            "move",
            [sentences.Date(1, 2), 4],
            "mueve la reunión del primero de marzo al viernes",
            "déplace la réunion du premier mars au vendredi",
            "verschieb das treffen vom ersten märz auf freitag",
        ),
        (
            "meeting",
            [sentences.Date(21, 7)],
            "la reunión es el veintiuno de agosto",
            "la réunion est le vingt et un août",
            "das treffen ist am einundzwanzigsten august",
        ),
        (
            "call",
            [[0, 1, 2]],
            "llama al cero uno dos",
            "appelle le zéro un deux",
            "ruf null eins zwei an",
        ),
    ],
)
def test_words_agree(kind, values, spanish, french, german):
    meaning = sentences.Sentence(kind, tuple(values))
    assert sentences.say(meaning, "es") == spanish
    assert sentences.say(meaning, "fr") == french
    assert sentences.say(meaning, "de") == german


def test_languages_are_named(tmp_path):
    for arguments, message in (
        ({"language": "it"}, "language='it'.*en, es, fr, de"),
        ({"translation": "nl"}, "translation='nl'.*en, es, fr, de"),
        ({"language": "fr", "translation": "fr"}, "is what is spoken"),
    ):
        with pytest.raises(sources.SourceError, match=message):
            _open(tmp_path, **arguments)


def test_other_seeds_and_sizes():
    def texts(count, seed):
        return [line["text"] for line in synthetic.utterances("train", count, seed)]

    assert texts(50, 0) == texts(80, 0)[:50]
    assert texts(50, 0) != texts(50, 1)


def test_speech_is_what_the_manifest_says(root):
    source = _open(root)
    assert len(source.utterances) == _COUNT
    assert len({u.tags["speaker"] for u in source.utterances}) > _COUNT // 2
    for i, utterance in enumerate(source.utterances):
        info = soundfile.info(source.open(i))
        assert (info.samplerate, info.channels, info.format) == (16000, 1, "FLAC")
        samples = audio.decode(source.open(i), 16000)
        assert len(samples) / 16000 == pytest.approx(utterance.duration, abs=1e-4)
        # A human pace, few enough labels for 40 ms frames, and neither silence nor clipping.
        assert 5 < len(utterance.text) / utterance.duration < 22
        level = np.abs(samples.astype(int))
        assert 2000 < level.max() < 32000
        loud = np.flatnonzero(level > 0.05 * level.max())
        assert loud[0] < 0.4 * 16000
        assert loud[-1] > len(samples) - 0.4 * 16000


def test_speech_does_not_depend_on_processes_or_size(root, tmp_path):
    expected = _bytes(_open(root))
    again = _open(tmp_path, utterances=_COUNT + 9, processes=3)
    assert _bytes(again)[:_COUNT] == expected
    assert _bytes(_open(root, "test")) != expected


def test_kept_on_disk_and_whole(root, monkeypatch):
    assert sorted(p.name for p in (root / "synthetic").iterdir()) == sorted(
        f"v1-seed0-{split}-{_COUNT}" for split in synthetic.SPLITS
    )
    monkeypatch.setattr(synthetic, "_speak_all", None)  # it is not spoken again
    assert len(_open(root, "dev").utterances) == _COUNT


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic.ACCENTS, "en", ("gmw/en-atlantis",))
    with pytest.raises(sources.SourceError, match=r"espeak-ng failed: .*no voice en-atlantis"):
        _open(tmp_path)
    assert not list((tmp_path / "synthetic").iterdir())


def test_without_espeak_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(sources.SourceError, match=r"pip install 'speech_jax\[quickstart\]'"):
        _open(tmp_path)
    assert not list(tmp_path.iterdir())


def test_sizes_by_split(root):
    sizes = {"dev": _COUNT, "train": 10**9}
    assert len(_open(root, "dev", utterances=sizes).utterances) == _COUNT
    with pytest.raises(sources.SourceError, match="utterances is 1000000000"):
        _open(root, "train", utterances=sizes)


def test_errors(tmp_path):
    with pytest.raises(sources.SourceError, match="no split 'valid'; it has train, dev, test"):
        _open(tmp_path, "valid")
    with pytest.raises(sources.SourceError, match="utterances is 0"):
        _open(tmp_path, utterances=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(sources.SourceError, match=r"cannot be written .* SPEECH_JAX_CACHE"):
        _open(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_one_meaning_in_two_languages(root, tmp_path):
    """Both directions say the same, and the splits are the same ones whatever is spoken."""
    spoken = _open(root, "dev", language="de", translation="en")
    for one in spoken.utterances:
        assert synthetic.split_of(one.tags["translation"]) == "dev"
        assert one.text.islower()
    there = {one.tags["translation"]: one.text for one in spoken.utterances}
    rng = random.Random(f"speech_jax {synthetic.VERSION} 0 dev")
    drawn = [sentences.draw(rng) for _ in range(5000)]
    said = {sentences.say(one, "en"): sentences.say(one, "de") for one in drawn}
    assert len(said.keys() & there.keys()) > 5
    assert all(said[text] == there[text] for text in said.keys() & there.keys())
    # Speech is spoken once: only the translation is another one.
    plain, into = _open(root, "dev"), _open(root, "dev", translation="es")
    assert _bytes(plain) == _bytes(into)
    assert [one.text for one in plain.utterances] == [one.text for one in into.utterances]
    assert "translation" not in plain.utterances[0].tags
    assert {one.tags["translation"] for one in into.utterances} & {
        sentences.say(one, "es") for one in drawn
    }
    assert _bytes(_open(root, "dev", language="fr")) != _bytes(plain)
