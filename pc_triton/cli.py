"""The command line: ``pc-triton train``, ``eval`` and ``generate``.

If the user's input is at fault, the program prints one line on stderr, ``pc-triton: error: problem: remedy``, and ends
with exit status 2. Ctrl-C also gives one line, and exit status 130; so does SIGTERM in training.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import interrupt
from .settings import Settings, stored_settings
from .text import InputError

EXTRAS = ("matplotlib", "safetensors", "tokenizers", "tqdm")
"""Packages that only the command line needs."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 or 130.

    argv: the arguments without the program's name; None for those of the process.
    """
    if sys.stderr is None:  # closed, as by 2>&-; print() would take stdout in its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return _fail("cannot print: standard output is closed: open it, as with `> /dev/null`")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may lack a character of generated text
    try:
        arguments = _parser().parse_args(argv)
        from . import train  # noqa: F401 with all that takes seconds to import

        interrupt.release()
        arguments.command(arguments)
        sys.stdout.flush()
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt as error:
        print(f"pc-triton: {str(error) or 'stopped'}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        return _fail(f"{missing} is not installed: pip install 'pc_triton[train]'")
    except OSError as error:
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}: choose another path")
        with contextlib.suppress(OSError):  # or Python would fail again when it flushes the buffer at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(f"cannot print: {error.strerror}: free space, or read the output to its end")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return _fail(
            "out of memory: train with a smaller --micro-batch, --batch, --context, --width or --blocks, or read a "
            "large text by --stream"
        )
    return 0


def _fail(message: str) -> int:
    print("pc-triton: error:", " ".join(message.split()), file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}: see `{self.prog} --help`")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse would say nothing if it cannot be printed


def _path(text: str) -> str:
    """The type of arguments that name a file or folder. Raises ArgumentTypeError for what can be no name."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "pc-triton",
        description="Train a transformer language model by predictive coding, and use it.",
        epilog="See `pc-triton train --help`, and likewise for eval and generate. To train in N processes, a GPU each: "
        "`torchrun --nproc-per-node N -m pc_triton.cli train`.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        description = help[0].upper() + help[1:] + "."
        added = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
        added.set_defaults(command=run)
        return added

    train = command("train", _train, "train a language model on text; leaves a checkpoint and a PNG of the curves")
    for f in dataclasses.fields(Settings):
        option = "--" + f.name.replace("_", "-")
        if f.type == "bool":
            switch, text = argparse.BooleanOptionalAction, f.metadata["help"]
            train.add_argument(option, action=switch, default=argparse.SUPPRESS, help=text)
            continue
        kind = {"int": int, "float": float, "str": str}[str(f.type).removesuffix(" | None")]
        choices, text = f.metadata["choices"], f.metadata["help"]
        text += "" if f.default is None else f" (default {f.default})"
        metavar = None if choices else {int: "N", float: "X", str: "SOURCE" if f.default is None else "X"}[kind]
        train.add_argument(option, type=kind, choices=choices, default=argparse.SUPPRESS, help=text, metavar=metavar)
    train.add_argument("--out", metavar="FOLDER", type=_path, help="folder of the run (default runs/METHOD)")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its settings")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    train.add_argument("--tensorboard", action="store_true", help="write event files for TensorBoard to --out too")
    train.add_argument(
        "--shard", action="store_true", help="split the model among the processes, by FSDP2; else each has all of it"
    )
    train.add_argument("--profile", action="store_true", help="write a trace of a few steps to --out, trace.json")
    train.add_argument("--quiet", action="store_true", help="print the result only")

    evaluate = command("eval", _eval, "measure a trained model: perplexity, and the regime of its inference")
    evaluate.add_argument(
        "--data",
        metavar="FILE",
        type=_path,
        help="UTF-8 text file to measure on, whole; by default the held-out part of the run's text",
    )
    evaluate.add_argument(
        "--html", metavar="FILE", type=_path, help="write a page too: every node, the regime, the run's curves"
    )

    generate = command("generate", _generate, "continue a prompt by a trained model")
    generate.add_argument("--prompt", metavar="TEXT", required=True, help="text to continue")
    generate.add_argument("--tokens", metavar="N", type=int, default=100, help="tokens to add, at most (default 100)")
    generate.add_argument(
        "--temperature", metavar="X", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)"
    )
    generate.add_argument(
        "--top-k", metavar="N", type=int, default=40, help="draw from the N likeliest tokens; 0 is all (default 40)"
    )
    generate.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the draws (default 0)")
    for added in (evaluate, generate):
        added.add_argument(
            "--checkpoint",
            metavar="PATH",
            type=_path,
            default="runs/pc",
            help="a run's folder or its file (default runs/pc)",
        )
    for added in (train, evaluate, generate):
        added.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    return parser


def _train(arguments: argparse.Namespace) -> None:
    from . import checkpoint, parallel
    from .train import train

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # our own error line says what it would log
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings) if hasattr(arguments, f.name)}
    out = Path(arguments.out or f"runs/{given.get('method', 'pc')}")
    settings = Settings(**given)
    if arguments.resume:
        if "data" in given or "stream" in given:  # replaces the stored source
            given = {"data": None, "stream": None} | given
        settings = dataclasses.replace(stored_settings(out, checkpoint.load_record(out)), **given)
    with parallel.joined():
        result = train(
            settings,
            out,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            device=arguments.device,
            quiet=arguments.quiet,
            tensorboard=arguments.tensorboard,
            profile=arguments.profile,
            shard=arguments.shard,
        )
        writes = parallel.rank() == 0
    if not writes:
        return
    print(result["report"] or result["regime"])
    print(f"curves {result['curves']}, checkpoint {result['checkpoint']}")
    _print_perplexities(settings.method, result["held_out_perplexity"], result["unigram_perplexity"])


def _eval(arguments: argparse.Namespace) -> None:
    from . import checkpoint
    from .build import load
    from .data import encode
    from .evaluate import perplexity, regime, unigram_perplexity
    from .text import read_text
    from .train import BACKPROPAGATION

    if arguments.html is not None:
        checkpoint.check_replaceable(Path(arguments.html))
    model, free_energy, tokenizer, counts, tokens, record = load(arguments.checkpoint, arguments.device)
    settings = stored_settings(arguments.checkpoint, record)
    shows = sys.stderr.isatty()
    if arguments.data is not None:
        tokens = encode(tokenizer, read_text(arguments.data), model.separator, shows)
    measured, unigram = perplexity(model, tokens, shows), unigram_perplexity(counts, tokens, settings.context)
    report = regime(free_energy, tokens, settings.context, settings.reported(1), shows) if free_energy else None
    if arguments.html is not None:
        from .page import page

        facts = {"held-out perplexity": f"{measured:.2f}", "unigram model": f"{unigram:.2f}", "step": record["step"]}
        facts |= {name.replace("_", " "): fact for name, fact in record["settings"].items() if fact is not None}
        whole = page(str(arguments.checkpoint), report, record["evaluations"], record["losses"], facts)
        checkpoint.write(Path(arguments.html), whole.encode("utf-8", "backslashreplace"))
    print(report or BACKPROPAGATION)
    _print_perplexities(settings.method, measured, unigram)


def _print_perplexities(method: str, model: float, unigram: float) -> None:
    print(f"held-out perplexity per token: {model:.2f} ({method}), {unigram:.2f} (unigram model)")


def _generate(arguments: argparse.Namespace) -> None:
    from .build import load
    from .data import encode
    from .evaluate import generate

    try:
        arguments.prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8: give it in UTF-8") from None
    run = load(arguments.checkpoint, arguments.device)
    prompt = encode(run.tokenizer, arguments.prompt, run.model.separator)
    tokens = generate(run.model, prompt, arguments.tokens, arguments.temperature, arguments.top_k, arguments.seed)
    print(run.tokenizer.decode(tokens.tolist(), skip_special_tokens=False))


if __name__ == "__main__":
    sys.exit(main())
