"""The command line: ``pc-triton train``, ``eval`` and ``generate``.

Whatever is wrong with what the user gave ends with one line on stderr, ``pc-triton: error: problem: remedy``, and exit
status 2; Ctrl-C with one line and 130.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .train import Settings

EXTRAS = ("matplotlib", "safetensors", "tokenizers", "tqdm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; argv: the arguments without the program's name. Returns the exit status."""
    try:
        from .text import InputError
        from .train import Settings
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _fail(f"{error.name} is not installed: pip install 'pc_triton[train]'")
    try:
        arguments = _parser(Settings, InputError).parse_args(argv)
        arguments.command(arguments)
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt as error:
        print(f"pc-triton: {error or 'stopped before the first checkpoint: nothing to resume'}", file=sys.stderr)
        return 130
    except (MemoryError, torch.OutOfMemoryError):
        return _fail("out of memory: lower --batch, --context, --width or --blocks")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return _fail("out of memory: lower --batch, --context, --width or --blocks")
    return 0


def _fail(message: str) -> int:
    print("pc-triton: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _parser(settings: type[Settings], error: type[Exception]) -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise error(f"{message}: see `{self.prog} --help`")

    parser = Parser(
        "pc-triton", description="Train a transformer by predictive coding, and use it.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="train | eval | generate")

    train = commands.add_parser("train", help="train a language model on text", allow_abbrev=False)
    train.set_defaults(command=_train)
    for f in dataclasses.fields(settings):
        kind = str if f.default is None else type(f.default)
        default = "" if f.default is None else f" (default {f.default})"
        choices, text = f.metadata["choices"], f.metadata["help"] + default
        option = "--" + f.name.replace("_", "-")
        train.add_argument(
            option, type=kind, choices=choices, default=argparse.SUPPRESS, help=text, metavar=f.name.upper()
        )
    train.add_argument("--out", help="folder of the run (default runs/METHOD)")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its settings")
    train.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    train.add_argument("--quiet", action="store_true", help="print the result only")

    evaluate = commands.add_parser("eval", help="measure a trained model", allow_abbrev=False)
    evaluate.set_defaults(command=_eval)
    evaluate.add_argument(
        "--data", help="UTF-8 text file to measure on, whole; by default the held-out part of the run's text"
    )

    generate = commands.add_parser("generate", help="continue a prompt", allow_abbrev=False)
    generate.set_defaults(command=_generate)
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument("--tokens", type=int, default=100, help="tokens to add (default 100)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    generate.add_argument(
        "--top-k", type=int, default=40, help="draw from the k likeliest tokens; 0 is all (default 40)"
    )
    generate.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    for command in (evaluate, generate):
        command.add_argument("--checkpoint", default="runs/pc", help="a run's folder or its file (default runs/pc)")
    for command in (train, evaluate, generate):
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    return parser


def _train(arguments: argparse.Namespace) -> None:
    from . import checkpoint
    from .train import Settings, stored_settings, train

    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings) if hasattr(arguments, f.name)}
    out = Path(arguments.out or f"runs/{given.get('method', 'pc')}")
    settings = Settings(**given)
    if arguments.resume:
        _, record = checkpoint.load(out)
        settings = dataclasses.replace(stored_settings(out, record), **given)
    result = train(
        settings,
        out,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        device=arguments.device,
        quiet=arguments.quiet,
    )
    if result["report"] is not None:
        print(result["report"])
    else:
        print(result["regime"])
    print(f"curves {result['curves']}, checkpoint {result['checkpoint']}")
    _print_perplexities(settings.method, result["held_out_perplexity"], result["unigram_perplexity"])


def _eval(arguments: argparse.Namespace) -> None:
    from .text import read_text, split
    from .train import encode, load, perplexity, regime, unigram_perplexity

    model, free_energy, tokenizer, counts, settings = load(arguments.checkpoint, arguments.device)
    text = read_text(arguments.data) if arguments.data else split(read_text(settings.data))[1]
    tokens = encode(tokenizer, text)
    measured = perplexity(model, tokens)
    if free_energy is not None:
        print(regime(free_energy, tokens, settings.context, settings.batch))
    else:
        print("backpropagation: no inference")
    _print_perplexities(settings.method, measured, unigram_perplexity(counts, tokens, settings.context))


def _print_perplexities(method: str, model: float, unigram: float) -> None:
    print(f"held-out perplexity per token: {model:.2f} ({method}), {unigram:.2f} (unigram model)")


def _generate(arguments: argparse.Namespace) -> None:
    from .text import InputError
    from .train import encode, generate, load

    try:
        arguments.prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8: give it in UTF-8") from None
    model, _, tokenizer, _, _ = load(arguments.checkpoint, arguments.device)
    prompt = encode(tokenizer, arguments.prompt)
    tokens = generate(model, prompt, arguments.tokens, arguments.temperature, arguments.top_k, arguments.seed)
    print(tokenizer.decode(tokens.tolist(), skip_special_tokens=False))


if __name__ == "__main__":
    sys.exit(main())
