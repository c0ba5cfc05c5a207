"""Spoken digits, hardened with FGSM: as many updates as configs/spoken_digits.py, twice the work.

  python -m speech_jax.main --config=configs/robust_digits.py --workdir=runs/robust_digits \\
      --config.data.root=/path/to/SpokenDigits

How much it helps (--mode=robustness for this run and one of configs/spoken_digits.py, then
`python -m benchmarks.robustness` for both curves in one plot) is in benchmarks/RESULTS.md.
"""

from configs import spoken_digits


def get_config():
    config = spoken_digits.get_config()
    config.adversarial.method = "fgsm"
    config.adversarial.epsilon = 0.001
    config.adversarial.alpha = 0.5
    # The model has to understand speech before it can learn to withstand anything.
    config.adversarial.warmup = 500
    return config
