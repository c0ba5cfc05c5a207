import os
import string
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_jax.data import text

_TEXTS = [
    "SET AN ALARM FOR SEVEN THIRTY",
    "CALL FOUR TWO NINE",
    "THE MEETING IS ON THE THIRD OF MAY",
    "TURN OFF THE RADIO AT HALF PAST TEN",
    "WHO'S THERE",
]
_MAKE = {
    "characters": lambda **kw: text.make_tokenizer("characters", _TEXTS, **kw),
    "unigram": lambda **kw: text.make_tokenizer(
        "sentencepiece", _TEXTS * 5, vocabulary_size=36, **kw
    ),
    "bpe": lambda **kw: text.make_tokenizer(
        "sentencepiece", _TEXTS, vocabulary_size=40, algorithm="bpe", **kw
    ),
}


@pytest.fixture(scope="module", params=_MAKE)
def tokenizer(request):
    return _MAKE[request.param]()


# What the training transcripts have: B, J, K, Q, X and Z are not among it.
_KNOWN = "".join(sorted(set("".join(_TEXTS)) - {" "}))
_WORDS = st.lists(st.text(_KNOWN, min_size=1, max_size=8), max_size=8)


@settings(max_examples=50, deadline=None)
@given(words=_WORDS)
def test_round_trip_without_blank(tokenizer, words):
    written = " ".join(words)
    ids = tokenizer.encode(written)
    assert all(0 < i < tokenizer.vocabulary_size for i in ids)
    assert tokenizer.decode(ids) == written
    with_blanks = [i for pair in zip(ids, [0] * len(ids), strict=True) for i in pair]
    assert tokenizer.decode(with_blanks) == written


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    loaded = text.load_tokenizer(path)
    assert loaded.vocabulary_size == tokenizer.vocabulary_size
    assert loaded.normalizer == tokenizer.normalizer
    assert [loaded.encode(t) for t in _TEXTS] == [tokenizer.encode(t) for t in _TEXTS]
    path.write_text(path.read_text()[:-20])
    with pytest.raises(text.TextError, match=r"tokenizer\.json is damaged"):
        text.load_tokenizer(path)
    with pytest.raises(text.TextError, match="No such file"):
        text.load_tokenizer(tmp_path / "absent.json")


@pytest.mark.parametrize("kind", _MAKE)
def test_the_same_texts_make_the_same_tokenizer_in_silence(kind, tmp_path, capfd):
    for name in ("a", "b"):
        _MAKE[kind](normalizer="librispeech").save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert capfd.readouterr() == ("", "")
    assert text.load_tokenizer(tmp_path / "a").normalizer == "librispeech"


def test_unknown_character_is_named(tokenizer):
    with pytest.raises(text.UnknownCharacterError, match=r"'É' \(U\+00C9, LATIN CAPITAL.*ACUTE\)"):
        tokenizer.encode("CAFÉ")
    with pytest.raises(text.UnknownCharacterError, match=r"'Z' .*ACDEF"):
        tokenizer.encode("ZERO")


@pytest.mark.parametrize("kind", _MAKE)
def test_tokenizers_normalize(kind):
    tokenizer = _MAKE[kind](normalizer="librispeech")
    assert tokenizer.decode(tokenizer.encode("  Who’s  thére?")) == "WHO'S THERE"


def test_stated_alphabet_gives_the_ids():
    tokenizer = text.make_tokenizer("characters", [], alphabet=" " + string.ascii_uppercase)
    assert tokenizer.vocabulary_size == 28
    assert tokenizer.encode("A Z") == [2, 1, 27]


@pytest.mark.parametrize(
    ("name", "written", "normal"),
    [
        ("none", " Say  “Hi” ", "Say “Hi”"),
        ("none", "e\u0301", "é"),
        ("upper", "straße", "STRASSE"),
        ("lower", "ÉTÉ", "été"),
        ("librispeech", "He’d well-nigh met Zoë, at 5!", "HE'D WELL NIGH MET ZOE AT 5"),
        ("words", "He’d well-nigh met Zoë, at 5!", "he'd well nigh met zoë at 5"),
        ("words", "नमस्ते दुनिया।", "नमस्ते दुनिया"),
        ("words", "தமிழ் மொழி", "தமிழ் மொழி"),
        ("words", "กินข้าว", "กินข้าว"),
        ("words", "Işık ışık, İyi", "işık ışık i\u0307yi"),
        ("words", "كِتَابٌ؟", "كِتَابٌ"),
        ("words", "می\u200cخواهم", "می\u200cخواهم"),
        ("english", "rock_and—roll", "ROCK AND ROLL"),
        ("moses", "C&apos; est &quot; ça &quot; .", "c' est ça"),
        ("librispeech", "rock_and—roll", "ROCK AND ROLL"),
    ],
)
def test_normalizers(name, written, normal):
    assert text.normalize(written, name) == normal
    assert text.normalize(normal, name) == normal


# Words that differ by marks and letters which a normalizer for English drops.
LANGUAGES = {
    "Hindi": "कल कला की कि",
    "Bengali": "কর করা করি",
    "Tamil": "கல் கால் கலை",
    "Thai": "ขาว ข้าว ข่าว",
    "Burmese": "က ကာ ကို",
    "Khmer": "ក កា កី",
    "Japanese": "パンダ バンダ かぎ かき",
    "Korean": "한국어 학교",
    "Chinese": "你好 世界",
    "Russian": "мой мои ёж еж",
    "German": "schön schon maße masse",
    "Turkish": "ölü olu ılık ilik",
    "Vietnamese": "má mà mã ma",
    "French": "péché pêche",
    "Polish": "łaska laska",
    "Greek": "πότε ποτέ",
    "Arabic": "كِتَاب كُتَّاب",
    "Hebrew": "שָׁלוֹם שלום",
    "Amharic": "ሰላም ሰለም",
    "Yoruba": "ọkọ oko ọ̀kọ̀",
    "Persian": "می\u200cخواهم میخواهم",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_language_loses_letters_or_marks(language):
    written = unicodedata.normalize("NFC", LANGUAGES[language])
    normal = text.normalize(f"{written}!", "words")
    assert normal == written
    assert text.normalize(unicodedata.normalize("NFD", written), "words") == written
    assert not text.dropped([written, written.upper()], "words")
    tokenizer = text.make_tokenizer("characters", [written], normalizer="words")
    assert tokenizer.decode(tokenizer.encode(written)) == written


def test_what_a_normalizer_drops_is_counted():
    lost = text.dropped(["schön, schön", "Ça va?", "ok 5"], "english")
    assert lost == {"\u0308": 2, "\u0327": 1}
    assert text.dropped(["दुनिया"], "english").total() == 3
    assert not text.dropped(["HE'S — “here”, at 5:30!", "straße"], "english")
    assert not text.dropped(["l &apos;eau &amp; le sel"], "moses")
    assert not text.dropped([], "english")


def test_a_tokenizer_of_an_older_version_opens(tmp_path):
    path = tmp_path / "tokenizer.json"
    old = '{"kind": "characters", "normalizer": "librispeech", "alphabet": " ABC"}'
    path.write_text(old)
    assert text.load_tokenizer(path).encode("c b ä") == [4, 1, 3, 1, 2]


def test_a_tokenizer_can_be_read_by_whom_the_umask_lets(tokenizer, tmp_path):
    before = os.umask(0o022)
    try:
        tokenizer.save(tmp_path / "tokenizer.json")
    finally:
        os.umask(before)
    assert (tmp_path / "tokenizer.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "5", "{}", '{"kind": 5}', '{"kind": "characters"}', "[" * 9000),
        '{"kind": "words", "alphabet": "A"}',
        '{"kind": "characters", "alphabet": 5}',
        '{"kind": "characters", "alphabet": "AA"}',
        '{"kind": "characters", "alphabet": "A", "normalizer": "gone"}',
        '{"kind": "characters", "alphabet": "A", "more": "B"}',
        '{"kind": "sentencepiece", "model": "AAAA"}',
        '{"kind": "sentencepiece", "model": "!"}',
        '{"kind": "sentencepiece"}',
    ],
)
def test_a_file_that_is_no_tokenizer_is_an_error_of_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(text.TextError) as caught:
        text.load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_errors():
    with pytest.raises(text.TextError, match="unknown normalizer 'uper'; known: none, upper"):
        text.normalize("A", "uper")
    with pytest.raises(text.TextError, match="unknown tokenizer 'words'"):
        text.make_tokenizer("words", _TEXTS)
    with pytest.raises(text.TextError, match="repeats 'A'"):
        text.CharacterTokenizer("ABA")
    with pytest.raises(text.TextError, match="no characters; state the alphabet"):
        text.make_tokenizer("characters", ["", " "])
    with pytest.raises(text.TextError, match="needs vocabulary_size"):
        text.make_tokenizer("sentencepiece", _TEXTS)
    with pytest.raises(text.TextError, match="no text to train"):
        text.make_tokenizer("sentencepiece", ["", " "], vocabulary_size=30)
    with pytest.raises(text.TextError, match="unknown algorithm 'word'"):
        text.make_tokenizer("sentencepiece", _TEXTS, vocabulary_size=30, algorithm="word")


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_vocabulary_that_does_not_fit_the_text(algorithm):
    def make(size):
        return text.make_tokenizer(
            "sentencepiece", _TEXTS, vocabulary_size=size, algorithm=algorithm
        )

    with pytest.raises(text.TextError, match=r"500 is too large .* set it to \d+ or less") as large:
        make(500)
    with pytest.raises(text.TextError, match=r"5 is too small .* set it to \d+ or more") as small:
        make(5)
    for caught in (large, small):  # the cure works
        size = int(str(caught.value).split("set it to ")[1].split()[0])
        assert make(size).vocabulary_size == size


def test_a_save_that_fails_leaves_nothing(tmp_path):
    tokenizer = text.CharacterTokenizer("AB", normalizer="\ud800")  # cannot be written as UTF-8
    with pytest.raises(UnicodeEncodeError):
        tokenizer.save(tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())
