"""Spoken digits, hardened with FGSM from random starts; updates as in configs/spoken_digits.py.

  python -m speech_jax.main --config=configs/robust_digits.py --workdir=runs/robust_digits \\
      --config.data.root=/path/to/SpokenDigits

An update is 1.7 times the work: a pass for the slope at the start, and one to learn from.
How much it helps (--mode=robustness for this run and one of configs/spoken_digits.py, then
`python -m benchmarks.robustness` for both curves in one plot) is in benchmarks/RESULTS.md.
"""

from configs import spoken_digits


def get_config():
    config = spoken_digits.get_config()
    # Without it log-mel follows the quietest noise through 40 dB of silence, and one step along the
    # slope says little of what is worst. Alone, it protects from nothing much.
    config.features.floor = 1e-3
    # Enough is hidden by what is added: with masks over whole words too, the training underfits.
    config.spec_augment.time_masks = 0
    config.adversarial.method = "fgsm"
    # In a larger ball one step no longer finds what ten find.
    config.adversarial.epsilon = 0.004
    # From the centre alone a step is a weak attack on log-mel: silence has no slope to follow.
    config.adversarial.random_start = True
    # All of the loss is adversarial, as in fast adversarial training (Wong et al. 2020).
    config.adversarial.alpha = 1.0
    # The model has to understand speech before it can learn to withstand anything.
    config.adversarial.warmup = 500
    return config
