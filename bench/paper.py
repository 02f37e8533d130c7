"""The three experiments of Pinchetti et al. 2022 and what goes past them, each by one command.

    python bench/paper.py EXPERIMENT [--data PATH] [--quick] [--jobs 2] [--out FILE]

Every method has the same model, data, steps and number of trials; the JSON holds every run and is resumed after an
interruption, the tables go to stdout, the figure beside the JSON. Without ``--data`` the data are those that come with
a package. ``--quick`` is a smoke run.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path

from pc_triton.text import InputError

EXPERIMENTS = ("toy", "vae", "lm", "early", "depth", "displacement", "states", "float8", "beyond", "backwards")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, help="folder of the data set; see the experiment's module")
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps, to try the script")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one thread (default 1)")
    parser.add_argument("--out", type=Path, help="JSON of the runs (default bench/results/paper_EXPERIMENT_DATA.json)")
    options = parser.parse_args()
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    name = f"paper_{options.experiment}_{options.data.name if options.data else 'default'}.json"
    folder = Path(tempfile.gettempdir()) / "quick" if options.quick else Path(__file__).parent / "results"
    experiment = importlib.import_module(f"paper_{options.experiment}")
    try:
        print(experiment.reproduce(options.data, options.quick, options.out or folder / name, options.jobs))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
