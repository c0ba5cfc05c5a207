"""The batches that steps are measured on, ours and the peers'."""

BATCH_SECONDS = 320  # of recipe.py
ROW_SECONDS = 16.0  # of every row
# Seconds of audio in a batch, and labels a second.
SIZES = {
    "conformer-l": (640, 5),
    "conformer-m": (1280, 5),
    "conformer-s": (2560, 5),
    "wav2vec2-base": (320, 12),
    "recipe": (BATCH_SECONDS, 7),
}
