"""Spoken digits, hardened with FGSM from random starts; updates as in configs/spoken_digits.py.

  python -m speech_jax.main --config=configs/robust_digits.py --workdir=runs/robust_digits \\
      --config.data.root=/path/to/SpokenDigits

An update is 2.7 times the work: the clean loss and the slope at the start are separate passes.
How much it helps (--mode=robustness for this run and one of configs/spoken_digits.py, then
`python -m benchmarks.robustness` for both curves in one plot) is in benchmarks/RESULTS.md.
"""

from configs import spoken_digits


def get_config():
    config = spoken_digits.get_config()
    config.adversarial.method = "fgsm"
    # Beyond 0.005, where a model that is not hardened loses half of its words to PGD-10: what is
    # learned from a single step holds against ten only in a smaller ball.
    config.adversarial.epsilon = 0.008
    # FGSM from the centre alone is a weak attack on log-mel, whose floor hides slopes in silence.
    config.adversarial.random_start = True
    config.adversarial.alpha = 0.5
    # The model has to understand speech before it can learn to withstand anything.
    config.adversarial.warmup = 500
    return config
