"""Portions of a split: together they are all of it, and what belongs together stays so."""

import dataclasses
import itertools

import pytest

from speech_jax.data.sources import FileSource, Utterance
from speech_jax.data.sources.portions import parse, portion
from speech_jax.errors import UserError

CUTS = (0.0, 0.6, 0.7, 1.0)


def corpus(speakers=3, chapters=2, utterances=10):
    """Utterances whose ids are in another order than they are."""
    found = [
        Utterance(f"{s}-{c}-{u:02}", 1.0, tags={"speaker": f"{s}", "chapter": f"{s}-{c}"})
        for u, c, s in itertools.product(range(utterances), range(chapters), range(speakers))
    ]
    return FileSource(tuple(found), tuple(one.id for one in found), {})


def portions(source, **settings):
    return [portion(source, low, high, **settings) for low, high in itertools.pairwise(CUTS)]


@pytest.mark.parametrize("within", ["", "speaker"])
@pytest.mark.parametrize("together", ["", "speaker", "chapter"])
@pytest.mark.parametrize("chapters", [1, 5])
def test_portions_are_all_of_a_split_and_do_not_overlap(within, together, chapters):
    source = corpus(chapters=chapters)
    found = portions(source, within=within, together=together)
    ids = [one.id for part in found for one in part.utterances]
    assert sorted(ids) == sorted(one.id for one in source.utterances)
    for part in found:
        for place, one in enumerate(part.utterances):
            assert part.open(place) == one.id
    values = lambda tag: [{one.tags[tag] for one in part.utterances} for part in found]
    if within == "speaker":
        assert all(len(speakers) == 3 for speakers in values("speaker")[::2])
    alone = within == together or (within == "speaker" and chapters == 1)
    if together and not alone:
        assert sum(map(len, values(together))) == len(set().union(*values(together)))


def test_what_was_skipped_is_counted_in_one_portion():
    skipped = dict.fromkeys(("", "0-0-05x", "0-1-03x", "2-1-10", "/data/x.wav"), "broken")
    found = portions(dataclasses.replace(corpus(), skipped=skipped), within="speaker")
    assert sorted(name for part in found for name in part.skipped) == sorted(skipped)
    assert "2-1-10" in found[-1].skipped


def test_a_speaker_of_one_chapter_is_cut_by_its_utterances():
    found = portions(corpus(chapters=1), within="speaker", together="chapter")
    assert [len(part.utterances) for part in found] == [18, 3, 9]
    assert {one.id[-2:] for one in found[0].utterances} == {f"{u:02}" for u in range(6)}


def test_names():
    assert parse("dev") == ("dev", 0.0, 1.0)
    assert parse("a[b]") == ("a[b]", 0.0, 1.0)
    assert parse("train-5[:60%]") == ("train-5", 0.0, 0.6)
    assert parse("train-5[60%:]") == ("train-5", 0.6, 1.0)
    assert parse("x/y[5%:70%]") == ("x/y", 0.05, 0.7)
    for wrong in ("dev[60%:60%]", "dev[80%:20%]", "dev[:101%]"):
        with pytest.raises(UserError, match="is not a portion of dev"):
            parse(wrong)
