"""Bets on what settled predictive coding is for, each with its control; docs/bets.md says what was written down first.

    python bench/bets.py BET [--data FOLDER] [--quick] [--jobs 1] [--out FILE]

The JSON holds every run and is resumed after an interruption, the tables go to stdout, the figure beside the JSON.
``--data`` is a folder that holds the folders mnist, fashion, wikitext-2 and lm1b; without it the images are
scikit-learn's digits, and every text is a part of the default one. ``--quick`` is a smoke run.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path

from pc_triton.text import InputError

BETS = ("tuning", "displacement", "large_batch", "online", "few_images")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bet", choices=BETS)
    parser.add_argument("--data", type=Path, help="folder of the folders mnist, fashion, wikitext-2 and lm1b")
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps, to try the script")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one thread (default 1)")
    parser.add_argument("--out", type=Path, help="JSON of the runs (default bench/results/bets_BET.json)")
    options = parser.parse_args()
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    folder = Path(tempfile.gettempdir()) / "quick" if options.quick else Path(__file__).parent / "results"
    bet = importlib.import_module(f"bets_{options.bet}")
    out = options.out or folder / f"bets_{options.bet}.json"
    try:
        print(bet.reproduce(options.data, options.quick, out, options.jobs))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
