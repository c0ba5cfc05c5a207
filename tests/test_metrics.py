"""WER equals jiwer on anything; sums merge."""

import jiwer
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_jax.evaluators import errors as metrics

TEXT = st.text(alphabet="ab \t’é漢", max_size=20)


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT)
def test_counts_equal_jiwer(reference, hypothesis):
    ours = metrics.count_errors(reference, hypothesis)
    words, spoken = " ".join(reference.split()), " ".join(hypothesis.split())
    if words:
        theirs = jiwer.process_words(words, spoken)
        edits = (theirs.insertions, theirs.deletions, theirs.substitutions)
        assert ours.wer == theirs.wer
        assert ours.insertions + ours.deletions + ours.substitutions == sum(edits)
        assert ours.insertions - ours.deletions == edits[0] - edits[1]
        assert abs(ours.cer - jiwer.cer(words, spoken)) < 1e-12
    else:
        assert ours.insertions == len(spoken.split())
        assert ours.wer == (float("inf") if spoken else 0.0)


@given(st.lists(st.tuples(TEXT, TEXT), max_size=5))
def test_a_corpus_is_the_sum_of_its_parts(pairs):
    parts = [metrics.count_errors(*pair) for pair in pairs]
    total = sum(parts, metrics.ErrorCounts())
    assert total == sum(reversed(parts), metrics.ErrorCounts())
    assert total.utterances == len(pairs)
    assert total.words == sum(len(reference.split()) for reference, _ in pairs)
