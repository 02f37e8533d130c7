"""The numbers of other libraries that docs/notebooks/coming_from_other_libraries.ipynb compares with.

    PYTHON bench/same_numbers.py pcx        # the python of an environment with pcx==0.6.3 and scikit-learn
    PYTHON bench/same_numbers.py fabricpc   # and with fabricpc==0.6.0; the two need different versions of JAX

Prints how far each weight matrix moved in the notebook's training: 64 digits, a network 64-20-20-10 with tanh,
cross-entropy, 20 steps of SGD at 0.1 on all of them, 8 inference steps at 0.1 in each.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import rivals
from sklearn.datasets import load_digits

SIZES, STEPS, T = (64, 20, 20, 10), 20, 8
KINDS = {
    "pcx": {"simultaneous": {}},
    "fabricpc": {"InferenceSGD": {}, "EPCInference": {"error_order": True}},
}


def numbers() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """x ``[64, 64]`` float32, labels ``[64]`` and the weights ``[out, in]`` at the start, float32."""
    pixels, labels = load_digits(return_X_y=True)
    random = np.random.RandomState(0)
    weights = [(random.randn(n, m) / m**0.5).astype(np.float32) for m, n in pairwise(SIZES)]
    return (pixels[:64] / 16).astype(np.float32), labels[:64], weights


def main(library: str) -> None:
    x, y, weights = numbers()
    for name, options in KINDS[library].items():
        trained = getattr(rivals, library)([(x, y)], T, weights=weights, **options)
        for _ in range(STEPS):
            trained.step(0)
        moved = (np.linalg.norm(np.asarray(now, float) - start) for now, start in zip(trained.weights(), weights))
        print(f"{name}:", ", ".join(f"{distance:.6f}" for distance in moved))  # the digits that float32 has


if __name__ == "__main__":
    main(sys.argv[1])
