"""Translation in miniature: synthetic speech to text in another language on two CPU cores.

python -m speech_jax.main --config=configs/translate_quickstart.py --workdir=runs/translate

The argument says from which language into which one: en-es by default, en-fr, en-de, es-en, fr-en
or de-en, as in --config=configs/translate_quickstart.py:de-en.
"""

from configs import quickstart
from speech_jax import tasks
from speech_jax.errors import UserError

PAIRS = ("en-es", "en-fr", "en-de", "es-en", "fr-en", "de-en")


def get_config(pair: str = "en-es"):
    if pair not in PAIRS:
        raise UserError(f"{pair!r} is no pair of languages; there are {', '.join(PAIRS)}")
    language, translation = pair.split("-")
    config = quickstart.get_config()
    config.data.arguments.update({"language": language, "translation": translation})
    config.text.normalizer = "words"
    config.parts = {"target": {"tag": "translation"}}
    config.task = tasks.settings("translate", layers=2)
    config.decoder.width = 3
    config.train.steps = 3_000
    return config
