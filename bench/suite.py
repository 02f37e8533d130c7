"""Methods of predictive coding against backpropagation (BP) on small tasks, by one command and in one file.

    python bench/suite.py --data FOLDER                 # the grid; FOLDER holds mnist/ and fashion/, idx .gz files
    python bench/suite.py --data FOLDER --tasks decoder --methods bp pc --seeds 1
    python bench/suite.py stability --data FOLDER       # what a fixed step does as the curvature grows
    python bench/suite.py page                          # tables and figures of the file into docs/benchmark.md
    python bench/suite.py --quick                       # everything at once, tiny, on scikit-learn's digits

Every method has the same number of trials of the same number of steps, on a seed of its own and on images that are
neither trained on nor measured on. A finished run is in the file at once, and a command that is interrupted goes on
where it was. Products and time of a step stand beside each score, relative to BP's. ``--device cuda`` trains larger
networks for longer, and has a file of its own.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from types import MappingProxyType
from typing import Any, NamedTuple

import paper_lm
import paper_toy
import suite_stability
import torch
from images import Images, images
from matplotlib.figure import Figure
from runs import (
    DIVERGED,
    TUNING_SEED,
    Record,
    Settings,
    chosen,
    complete,
    load,
    markdown,
    score,
    spread,
    standing,
)
from scipy import stats
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pc_triton as pc
from pc_triton.text import InputError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmark.md"
RESULTS = ROOT / "bench" / "results"
SEEDS = 5
TURNS = 20
INCREMENTAL_STEPS = 8
LATENT, LATENT_STEPS = 16, 8
"""Units of a decoder's latent state, and the steps in which every method infers it before it learns."""


# The methods: what `FreeEnergy` is given, how a step learns, and what is tuned.


class Network(NamedTuple):
    """A network with its optimiser; ``free_energy`` is None where backpropagation trains it."""

    model: nn.Module
    output: pc.Distribution
    optimizer: torch.optim.Optimizer
    free_energy: pc.FreeEnergy | None
    inference: pc.FreeEnergy | None
    """Infers the latent state of a decoder."""

    def update(self, loss: Tensor) -> Tensor:
        """One step of the weights."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def backpropagation(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """Plain torch: the output's energy at the forward pass."""
    return network.update(network.output.clamped(network.model(x), y).sum() / len(x))


def repeated(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """As many updates by backpropagation as `incremental` makes of a batch."""
    return [backpropagation(network, x, y) for _ in range(INCREMENTAL_STEPS)][-1]


def settled(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """Inference, then one step of the weights, by F per unit of the output's weight."""
    return network.update(network.free_energy(x, y) / network.free_energy.output_weight)


def incremental(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """States and weights move at every step."""
    return [network.update(loss) for loss in network.free_energy.incremental(x, y)][-1]


def centred(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """The mean of the gradients at an output weight and at its negative, each per unit of it."""
    free_energy, weight = network.free_energy, network.free_energy.output_weight
    network.optimizer.zero_grad()
    for free_energy.output_weight in (-weight, weight):
        loss = free_energy(x, y) / free_energy.output_weight
        (loss / 2).backward()
    network.optimizer.step()
    return loss.detach()


class Method(NamedTuple):
    """One row: ``own`` are the values of its own hyperparameter, where it has one that is tuned."""

    text: str
    learn: Callable[[Network, Tensor, Tensor], Tensor]
    options: Mapping[str, Any] = MappingProxyType({})
    own: Sequence[Settings] = ()
    squared: bool = False
    """Whether the output's energy is the squared error: a Gaussian of variance 1 on the output itself."""


STATES = {"order": "simultaneous", "precision": 1.0, "steps": 8}
STATE_STEPS = ({"step": 0.03}, {"step": 0.3})
WEIGHTS = ({"output_weight": 0.01}, {"output_weight": 0.1})

METHODS: dict[str, Method] = {
    "bp": Method("backpropagation", backpropagation),
    "pc": Method("the default: error order, T = 2, displacement 0.003", settled),
    "pc, 0.03": Method("error order, T = 4, displacement 0.03", settled, {"displacement": 0.03, "steps": 4}),
    "pc, 0.3": Method("error order, T = 8, displacement 0.3", settled, {"displacement": 0.3, "steps": 8}),
    "sPC": Method("simultaneous order, T = 8, precision 1, the step tuned", settled, STATES, STATE_STEPS),
    "iPC": Method(
        "incremental order, T = 8, precision 1, the step tuned",
        incremental,
        {"order": "incremental", "precision": 1.0, "steps": INCREMENTAL_STEPS},
        STATE_STEPS,
    ),
    "nudging, positive": Method(
        "simultaneous order, T = 8, precision 1, step 0.1, the output's weight tuned",
        settled,
        STATES | {"step": 0.1},
        WEIGHTS,
    ),
    "nudging, centred": Method(
        "the same at the weight and at its negative",
        centred,
        STATES | {"step": 0.1},
        WEIGHTS,
    ),
    "Gaussian PC": Method(
        "error order, T = 8, precision 1, squared error at the output",
        settled,
        {"precision": 1.0, "steps": 8},
        squared=True,
    ),
    "bp, squared error": Method(
        "backpropagation of Gaussian PC's output energy", backpropagation, squared=True
    ),
    "bp, 8 updates": Method("backpropagation, with as many steps of the weights a batch as iPC", repeated),
}  # fmt: skip
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def choices(method: Method) -> list[Settings]:
    """Four trials for each method: four learning rates, or two of them and two values of its own hyperparameter."""
    if not method.own:
        return [{"lr": lr} for lr in RATES]
    rates = RATES[:2] if method.learn is incremental else RATES[1:3]  # it moves the weights at every step of inference
    return [{"lr": lr} | own for lr in rates for own in method.own]


# The tasks: a network on a data set, and a score of which less is better.


class Task(NamedTuple):
    """A network, the data it learns, and the size of a run on a CPU and on a GPU."""

    data: str
    text: str
    network: Callable[[int, int, type[nn.Linear]], nn.Sequential]
    steps: int
    hidden: int
    gpu_steps: int
    gpu_hidden: int
    score: str = "test error, %"
    batch: int = 128

    @property
    def generates(self) -> bool:
        """Whether images are the output, and the input a latent state that is inferred."""
        return self.score != "test error, %"


def mlp(inputs: int, hidden: int, layer: type[nn.Linear]) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        layer(inputs, hidden), nn.Tanh(), layer(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 10)
    )  # fmt: skip


def convolutional(inputs: int, hidden: int, layer: type[nn.Linear]) -> nn.Sequential:
    """Two strided convolutions of ``hidden`` and twice as many channels, each with its value node, and the classes."""
    side = math.isqrt(inputs)

    def node() -> list[nn.Module]:
        return [pc.Gaussian()] if layer is pc.Linear else []

    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, hidden, 3, 2, 1), *node(), nn.ReLU(),
        nn.Conv2d(hidden, 2 * hidden, 3, 2, 1), *node(), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * hidden * (-(-side // 4)) ** 2, 10),
    )  # fmt: skip


def decoder(inputs: int, hidden: int, layer: type[nn.Linear]) -> nn.Sequential:
    """From the latent state to an image's logits."""
    return nn.Sequential(
        layer(LATENT, hidden), nn.Tanh(), layer(hidden, hidden), nn.Tanh(), nn.Linear(hidden, inputs)
    )  # fmt: skip


SQUARED = "squared error of a pixel, 1e-3"
TASKS: dict[str, Task] = {
    "mlp-fashion": Task("fashion", "two tanh layers on FashionMNIST", mlp, 200, 128, 5000, 512),
    "memory": Task(
        "fashion", "64 images of FashionMNIST stored, their lower halves recalled from their upper ones", decoder,
        100, 128, 3000, 512, f"{SQUARED} of the lower halves", batch=64,
    ),
    "conv-fashion": Task("fashion", "two strided convolutions on FashionMNIST", convolutional, 60, 8, 5000, 64),
    "decoder": Task(
        "fashion", "a decoder of FashionMNIST from an inferred latent state", decoder,
        100, 128, 5000, 512, f"{SQUARED} of test images",
    ),
    "mlp-mnist": Task("mnist", "two tanh layers on MNIST", mlp, 100, 128, 5000, 512),
}  # fmt: skip


def find(task: Task, settings: Settings, data: Path | None) -> Images:
    """The task's images; a memory is measured on those it has stored, in tuning on 64 others."""
    found = images(data / task.data if data else None, settings["tuning"])
    device = settings["device"]
    if task is TASKS["memory"]:
        first = 64 if settings["tuning"] else 0
        x, y = found.x[first : first + task.batch], found.y[first : first + task.batch]
        found = Images(x, y, x, y)
    return Images(*(part.to(device) for part in found))


def build(settings: Settings, inputs: int) -> Network:
    """The network, from the settings' seed, with its method."""
    task, method = TASKS[settings["task"]], METHODS[settings["method"]]
    by_bp = method.learn in (backpropagation, repeated)
    torch.manual_seed(settings["seed"])
    model = task.network(inputs, settings["hidden"], nn.Linear if by_bp else pc.Linear).to(settings["device"])
    output = pc.Gaussian(1.0) if method.squared else pc.Bernoulli() if task.generates else pc.Categorical()
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"])
    own = {name: settings[name] for choice in method.own[:1] for name in choice}
    options = {**method.options, **own}
    free_energy = None if by_bp else pc.FreeEnergy(model, output, **options)
    if not task.generates:
        return Network(model, output, optimizer, free_energy, None)
    infers = {name: options[name] for name in ("precision", "displacement") if name in options}
    infers["steps"] = LATENT_STEPS
    if by_bp:  # the latent state alone
        infers, model = infers | {"precision": 1.0}, nn.Sequential(pc.Gaussian(), *model)
    return Network(model, output, optimizer, free_energy, pc.FreeEnergy(model, output, **infers))


def latent(network: Network, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """The latent state ``[S, LATENT]`` that is inferred of images, or of the pixels of them that are True in mask."""
    prior = images.new_zeros(len(images), LATENT)
    if network.free_energy is None:
        return network.inference.infer(prior, images, mask=mask).u["0"]
    return network.inference.infer(prior, images, clamp_input=False, mask=mask).input


def pair(network: Network, settings: Settings, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What the network learns of a batch of images and their labels: input and output."""
    if TASKS[settings["task"]].generates:
        return latent(network, x), x
    return x, nn.functional.one_hot(y, 10).float() if METHODS[settings["method"]].squared else y


def measure(task: Task, network: Network, found: Images) -> float:
    """The score on the images that are measured on."""
    x = found.test_x
    if not task.generates:
        with torch.no_grad():
            return 100 * (network.model(x).argmax(-1) != found.test_y).double().mean().item()
    x, mask, unseen = x[:1000], None, slice(None)
    if task is TASKS["memory"]:
        unseen = slice(x.shape[1] // 2, None)
        mask = torch.ones_like(x, dtype=torch.bool)
        mask[:, unseen] = False
    z = latent(network, x, mask)
    with torch.no_grad():
        shown = network.output.emission(network.model(z))
    return 1000 * (shown - x)[:, unseen].double().square().mean().item()


def run(settings: Settings, data: Path | None) -> Record:
    """Train one network by Adam and measure it; or what a step costs, where ``turns`` asks for that."""
    if "turns" in settings:
        return cost(settings, data)
    task, method = TASKS[settings["task"]], METHODS[settings["method"]]
    found = find(task, settings, data)
    network = build(settings, found.x.shape[1])
    g = torch.Generator().manual_seed(settings["seed"])
    losses = []
    for step in range(settings["training_steps"]):
        batch = torch.randint(len(found.x), (task.batch,), generator=g).to(found.x.device)
        x, y = pair(network, settings, found.x[batch], found.y[batch])
        loss = method.learn(network, x, y)
        if not loss.isfinite():
            return {"diverged": f"the loss is {loss.item()} at step {step}"}
        losses.append(loss.item())
    result = measure(task, network, found)
    if not math.isfinite(result):
        return {"diverged": f"the score is {result}"}
    record: Record = {"score": result, "losses_every_20th": losses[::20]}
    if not settings["tuning"] and network.free_energy is not None:
        record |= standing(network.free_energy.report(x, y))
    return record


def cost(settings: Settings, data: Path | None) -> Record:
    """Products and time of a training step of every method, relative to backpropagation's, in turns in this process.

    On a CPU the time is that of this thread alone, so that other programs of the machine are not in it.
    """
    task = TASKS[settings["task"]]
    found = find(task, settings, data)
    gpu = settings["device"] == "cuda"
    sync, clock = (torch.cuda.synchronize, time.perf_counter) if gpu else (lambda: None, time.thread_time)
    steps: dict[str, Callable[[], Tensor]] = {}
    flops: dict[str, int] = {}
    for name, method in METHODS.items():
        own = settings | {"method": name} | choices(method)[0]
        network = build(own, found.x.shape[1])

        def step(method: Method = method, network: Network = network, own: Settings = own) -> Tensor:
            return method.learn(network, *pair(network, own, found.x[: task.batch], found.y[: task.batch]))

        step()  # the first finds the nodes, and the step of T = 2
        with FlopCounterMode(display=False) as counter:
            step()
        steps[name], flops[name] = step, counter.get_total_flops()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(settings["turns"]):
        for name, step in steps.items():
            sync()
            start = clock()
            step()
            sync()
            seconds[name].append(clock() - start)
    ratios = {name: [a / b for a, b in zip(taken, seconds["bp"])] for name, taken in seconds.items()}
    return {
        "costs": {
            name: {"products": flops[name] / flops["bp"], "time": median(r), "quartiles": quantiles(r, n=4)[::2]}
            for name, r in ratios.items()
        }
    }


# The grid.


class Options(NamedTuple):
    """What the command line asks for."""

    data: Path | None
    tasks: Sequence[str]
    methods: Sequence[str]
    seeds: int
    device: str
    quick: bool
    jobs: int
    out: Path


def base(name: str, options: Options) -> Settings:
    """What the runs of a task share."""
    task, gpu = TASKS[name], options.device == "cuda"
    hidden, steps = (task.gpu_hidden, task.gpu_steps) if gpu else (task.hidden, task.steps)
    if options.quick:
        hidden, steps = 4, 3
    data = task.data if options.data else "digits"
    return {"task": name, "data": data, "device": options.device, "hidden": hidden, "training_steps": steps}


def grid(options: Options) -> None:
    """Make the runs that the file lacks, task by task."""
    make = partial(run, data=options.data)
    for name in options.tasks:
        common = base(name, options)
        turns = common | {"seed": 0, "tuning": False, "turns": 2 if options.quick else TURNS}
        complete(options.out, [turns], make, 0)
        variants = [(common | {"method": m}, choices(METHODS[m])) for m in options.methods]
        if options.quick:
            variants = [(variant, tried[1:2]) for variant, tried in variants]
        chosen(options.out, variants, range(options.seeds), make, options.jobs)


# Tables and figures, from the file alone.


def paired(records: Sequence[Record], others: Sequence[Record]) -> tuple[float, float, int]:
    """Mean difference of the scores on the seeds that both have, half of its 95 % confidence interval, the seeds.

    By Student's t of the differences; the half is infinite with one seed, and both are where a run diverged.
    """
    by_seed = {record["settings"]["seed"]: score(record) for record in others}
    found = [score(r) - by_seed[r["settings"]["seed"]] for r in records if r["settings"]["seed"] in by_seed]
    if not found or not all(map(math.isfinite, found)):
        return DIVERGED, DIVERGED, len(found)
    if len(found) < 2:
        return found[0], DIVERGED, len(found)
    half = float(stats.t.ppf(0.975, len(found) - 1)) * stdev(found) / math.sqrt(len(found))
    return mean(found), half, len(found)


def minus(records: Sequence[Record], others: Sequence[Record]) -> str:
    """`paired` for a table, as in ``+0.50 [-0.10, +1.10]``."""
    middle, half, _ = paired(records, others)
    if not math.isfinite(middle):
        return ""
    return f"{middle:+.2f}" + (f" [{middle - half:+.2f}, {middle + half:+.2f}]" if math.isfinite(half) else "")


def by_method(runs: Sequence[Record], task: str) -> dict[str, list[Record]]:
    """The runs of a task that count, in the order of `METHODS`, and of the seeds."""
    found: dict[str, list[Record]] = {name: [] for name in METHODS}
    for record in sorted(runs, key=lambda record: record["settings"]["seed"]):
        settings = record["settings"]
        if settings.get("task") == task and "method" in settings and not settings["tuning"]:
            found[settings["method"]].append(record)
    return {name: records for name, records in found.items() if records}


def tuned(settings: Settings) -> str:
    """The learning rate, and the method's own parameter."""
    names = [name for name in ("lr", "step", "output_weight") if name in settings]
    return ", ".join(f"{name.replace('_', ' ')} {settings[name]:g}" for name in names)


def table(runs: Sequence[Record], task: str) -> str:
    """Markdown: a row for each method of a task."""
    costs = next((r["costs"] for r in runs if r["settings"].get("task") == task and "costs" in r), {})
    heads = ["method", "tuned", "seeds", "mean ± std", "minus bp [95 %]"]
    heads += ["products", "time", "settled", "cosine to bp"]
    found = by_method(runs, task)
    rows = []
    for name, records in found.items():
        settings, method_cost = records[0]["settings"], costs.get(name)
        row = [name, tuned(settings), str(len(records)), spread(records)]
        row.append("" if name == "bp" else minus(records, found.get("bp", [])))
        row += [f"{method_cost['products']:.2f}", f"{method_cost['time']:.2f}"] if method_cost else ["", ""]
        infers = [record for record in records if "settled" in record]
        share = mean(record["settled"] for record in infers) if infers else 0.0
        row.append(("F rose" if share < 0 else f"{share:.1%}") if infers else "")
        row.append(f"{mean(record['cosine'] for record in infers):.3f}" if infers else "")
        rows.append(row)
    return markdown(heads, rows)


def tuning(runs: Sequence[Record], task: str) -> str:
    """Markdown: the score of every trial; a diverged one says so."""
    rows: dict[str, list[str]] = {name: [] for name in METHODS}
    for record in runs:
        settings = record["settings"]
        if settings.get("task") == task and settings["tuning"] and settings["seed"] == TUNING_SEED:
            rows[settings["method"]].append(f"{tuned(settings)}: {spread([record])}")
    rows = {name: cells for name, cells in rows.items() if cells}
    width = max(map(len, rows.values()), default=0)
    heads = ["in tuning", *(f"trial {number}" for number in range(1, width + 1))]
    return markdown(heads, [[name, *cells, *[""] * (width - len(cells))] for name, cells in rows.items()])


def plot(runs: Sequence[Record], png: Path) -> None:
    """A panel a task: each method's difference to backpropagation and its interval, over the products of a step."""
    tasks = [name for name in TASKS if len(by_method(runs, name)) > 1]
    figure = Figure(figsize=(4.2 * max(len(tasks), 1), 4.2), layout="constrained")
    for number, name in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), number + 1)
        found = by_method(runs, name)
        labels = [method for method in found if method != "bp"]
        for place, method in enumerate(labels):
            middle, half, _ = paired(found[method], found.get("bp", []))
            if math.isfinite(middle):
                axes.errorbar([middle], [place], xerr=[half if math.isfinite(half) else 0], fmt="o", color=f"C{place}")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_title(f"{name}\n{TASKS[name].score}", fontsize=8)
        axes.set_xlabel("minus bp; less is better", fontsize=8)
    figure.savefig(png, dpi=100)


def of_the_paper(folder: Path) -> str:
    """Markdown: the paper's experiments and the default text, from the files of ``bench/paper.py``."""
    heads = ["file", "method", "seeds", "mean ± std", "minus bp [95 %]", "products of a training"]
    rows = []
    for stem, task, keep, titles, passes in PAPER:
        groups: dict[str, list[Record]] = {}
        for record in load(folder / f"{stem}.json")["runs"]:
            if not record["settings"]["tuning"] and keep(record["settings"]):
                groups.setdefault(titles(record["settings"]), []).append(record)
        first = next(iter(groups.values()))
        for title, records in groups.items():
            products = passes(records[0]["settings"]) / passes(first[0]["settings"])
            difference = "" if records is first else minus(records, first)
            row = [f"{stem}: {task}", title, str(len(records)), spread(records), difference]
            rows.append([*row, f"{products:.2f}"])
    return markdown(heads, rows)


def language_title(settings: Settings) -> str:
    """A run of paper_lm: its method, T, steps and warm-up."""
    inference = "" if settings["method"] == "bp" else f", T = {settings.get('inference_steps', 3)}"
    warmup = f", warm-up {settings['warmup']:g}" if "warmup" in settings else ""
    return f"{settings['method']}{inference}, {settings['steps']} steps{warmup}"


def error_passes(settings: Settings, steps: int) -> int:
    """Passes of a step: three of backpropagation, 2 T + 1 of error order."""
    learns_by_bp = "bp" in (settings.get("learning"), settings.get("method"))
    return 3 if learns_by_bp else 2 * steps + 1


PAPER: list[tuple[str, str, Callable[..., bool], Callable[..., str], Callable[..., int]]] = [
    (
        f"paper_toy_{data}",
        "hidden softmaxes, test error, %",
        lambda s: (
            s["task"] == "softmax hidden"
            and s.get("inference", {}).get("order", "error") == "error"
            and s.get("inference", {}).get("steps", 16) == 16
        ),
        paper_toy.title,
        lambda s: error_passes(s, s.get("inference", {}).get("steps", 3)),
    )
    for data in ("mnist", "fashion")
]
PAPER += [
    (
        f"paper_vae_{data}",
        "negative ELBO, Bernoulli output",
        lambda s: s["output"] == "bernoulli",
        lambda s: s["method"],
        lambda s: error_passes(s, 8 if "precision" in s["method"] else 3),
    )
    for data in ("mnist", "fashion")
]
PAPER += [
    (f"paper_lm_{data}", "perplexity", lambda s: True, language_title, paper_lm.products)
    for data in ("lm1b", "default")
]  # fmt: skip


def parts(out: Path) -> str:
    """What stands between the page's markers: versions, tables and figures, of the file alone."""
    results = load(out)
    runs = results["runs"]
    tasks = [name for name in TASKS if by_method(runs, name)]
    made_by = ", ".join(sorted({f"`{record['commit']}`" for record in runs}))
    environment = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    found = [f"Versions: {environment}. Commits of the runs: {made_by}."]
    found.append(
        "| method | what it is |\n| --- | --- |\n" + "\n".join(f"| {n} | {m.text} |" for n, m in METHODS.items())
    )
    found.append(f"![Differences to backpropagation]({link(out.with_suffix('.png'))})")
    for name in tasks:
        task = TASKS[name]
        settings = next(iter(by_method(runs, name).values()))[0]["settings"]
        size = f"{settings['training_steps']} steps, batch {task.batch}, width {settings['hidden']}"
        found.append(f"### {name}\n\n{task.text[0].upper()}{task.text[1:]}; {size}. Score: {task.score}.")
        found += [table(runs, name), tuning(runs, name)]
    stable = suite_stability.table(runs)
    if stable:
        found += ["### stability", f"![Accuracy and curvature]({link(stability_png(out))})", stable]
    found += ["### The paper's experiments and the default text", of_the_paper(RESULTS)]
    return "\n\n".join(found)


def link(png: Path) -> str:
    """As the page links to a file of results."""
    return f"../bench/results/{png.name}"


def stability_png(out: Path) -> Path:
    """The figure of the stability, beside the file."""
    return out.with_name(f"{out.stem}_stability.png")


BEGIN, END = "<!-- what follows is written by `python bench/suite.py page` -->", "<!-- until here -->"


def write_page(out: Path, page: Path = PAGE) -> None:
    """Put `parts` between the markers, and make the figures."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{parts(out)}\n\n{END}{after}", encoding="utf-8")
    draw(out)


def draw(out: Path) -> None:
    """The figures beside the file."""
    runs = load(out)["runs"]
    plot(runs, out.with_suffix(".png"))
    if suite_stability.table(runs):
        suite_stability.plot(runs, stability_png(out))


def stability(options: Options) -> None:
    """Make the runs of `suite_stability` that the file lacks."""
    make = partial(suite_stability.run, data=options.data / "fashion" if options.data else None)
    name = "fashion" if options.data else "digits"
    wanted = suite_stability.variants(name, options.device, options.seeds, options.quick)
    complete(options.out, wanted, make, options.jobs)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="grid", choices=("grid", "stability", "page"))
    parser.add_argument("--data", type=Path, help="folder of mnist/ and fashion/ (default scikit-learn's digits)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD",
                        help=", ".join(METHODS))  # fmt: skip
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default {SEEDS}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--jobs", type=int, default=0, help="runs at once, each in a process on one thread (default 0: here)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks and few steps, to try the script")
    parser.add_argument("--out", type=Path, help="the JSON (default bench/results/suite.json)")
    given = parser.parse_args()
    if given.data is not None and not given.data.is_dir():
        parser.error(f"--data {given.data}: no such folder")
    folder = Path(tempfile.gettempdir()) / "quick" if given.quick else RESULTS
    kind = ("_digits" if given.data is None else "") + ("_cuda" if given.device == "cuda" else "")
    out = given.out or folder / ("suite.json" if given.what == "page" else f"suite{kind}.json")
    seeds = 1 if given.quick else given.seeds
    if given.device == "cpu":
        torch.set_num_threads(1)  # as `runs` says of its file
    options = Options(given.data, given.tasks, given.methods, seeds, given.device, given.quick, given.jobs, out)
    try:
        if given.what == "page":
            write_page(out)
            return
        if given.what == "grid":
            grid(options)
        if given.what == "stability" or given.quick:
            stability(options)
    except InputError as error:
        parser.error(str(error))
    draw(out)
    print(parts(out))


if __name__ == "__main__":
    main()
