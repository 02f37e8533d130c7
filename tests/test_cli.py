"""The command line as a user runs it, at tiny sizes."""

import errno
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers", reason="the command line's extras: pip install 'pc_triton[train]'")

from safetensors.torch import load_file, save_file

from pc_triton import build, checkpoint, evaluate, memory, orders, report, run_files
from pc_triton import train as training
from pc_triton.cli import EXTRAS, main
from pc_triton.settings import Settings
from pc_triton.text import InputError

SENTENCES = (
    "the cat sat on the mat",
    "a dog ran over the hill",
    "one bird sings in the old tree",
    "we read a long book",
)
TEXT = "".join(f"{SENTENCES[i * i % 4]} and {SENTENCES[i * 7 % 3]}, {i % 10} times.\n" for i in range(400))
SIZES = (
    "--width 16 --heads 2 --blocks 1 --context 16 --vocabulary 300 --batch 4 --steps 20 --eval-every 10 --device cpu"
)


@pytest.fixture(autouse=True, scope="module")
def _fast():
    """One thread, and short long runs in reports."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "LONG_RUN", 3)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "pc"
    assert main(train_arguments(data, folder)) == 0
    return folder


def train_arguments(data, out, more=""):
    return ["train", "--data", str(data), "--out", str(out), *SIZES.split(), *more.split()]


def failure(capsys, arguments):
    """Run what must fail; return its one line."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("pc-triton: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.count(": ") >= 3, "a problem and a remedy"
    return captured.err


def command(*arguments, launcher=(), **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, *launcher, "-m", "pc_triton.cli", *map(str, arguments)]
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", **options
    )


def wait_for_checkpoint(folder, process, step=1):
    deadline = time.monotonic() + 300
    while not (folder / checkpoint.NAME).exists() or checkpoint.load_record(folder)["step"] < step:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)


def interrupt_at(monkeypatch, step):
    """Send this process a Ctrl-C within training step ``step`` (from 1)."""
    original, calls = training.losses, []

    def losses(*arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(training, "losses", losses)


# What works.


def test_as_a_user_runs_it(tmp_path, data, capsys):
    """Train in a process of its own, evaluate, generate."""
    out = tmp_path / "run"
    process = command(*train_arguments(data, out))
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stderr == "", "no progress bar in a log"
    assert "step 10/20: loss" in stdout
    assert "blocks.0.attn" in stdout, "energies per node"
    assert "of the reachable fall in 1 moves" in stdout
    assert "cosine to backpropagation" in stdout
    assert "(unigram model)" in stdout
    assert sorted(os.listdir(out)) == ["checkpoint.safetensors", "curves.png"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert main(["eval", "--checkpoint", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == stdout.splitlines()[-1], "the same held-out perplexity"
    assert main(["generate", "--checkpoint", str(out / checkpoint.NAME), "--prompt", "the cat", "--tokens", "5"]) == 0
    stdout = capsys.readouterr().out
    assert stdout.startswith("the cat")
    assert len(stdout) > len("the cat\n")


def test_importing_the_package_is_light():
    line = "import torch, sys; before = set(sys.modules); import pc_triton; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & {"triton", *EXTRAS}


@pytest.mark.parametrize("method", ["bp", "gaussian-pc"])
def test_other_methods(tmp_path, data, capsys, method):
    assert main(train_arguments(data, tmp_path, f"--method {method} --quiet")) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"({method})" in captured.out
    assert ("backpropagation: no inference" if method == "bp" else "cosine to backpropagation") in captured.out
    assert main(["eval", "--checkpoint", str(tmp_path), "--device", "cpu"]) == 0


@pytest.mark.parametrize("order", ["sweep", "simultaneous", "incremental"])
def test_other_orders(tmp_path, data, order):
    assert main(train_arguments(data, tmp_path, f"--order {order} --steps 2 --inference-steps 2 --quiet")) == 0


def test_it_learns(tmp_path, data):
    settings = Settings(
        data=str(data), width=32, heads=2, blocks=1, context=16, vocabulary=300, batch=8, steps=60, lr=1e-2
    )
    result = training.train(settings, tmp_path, device="cpu", quiet=True)
    assert result["held_out_perplexity"] < 0.5 * result["unigram_perplexity"]
    assert len(result["losses"]) == 60
    assert [row["step"] for row in result["evaluations"]] == [60]
    assert result["report"].settled > 0.5
    assert result["curves"].is_file()


@pytest.mark.parametrize("method", ["pc", "bp"])
def test_resume_is_bit_for_bit(tmp_path, data, capsys, monkeypatch, method):
    """20 steps straight are 13 steps, a Ctrl-C, and the rest."""
    assert main(train_arguments(data, tmp_path / "straight", f"--method {method}")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 13)
        assert main(train_arguments(data, tmp_path / "parts", f"--method {method}")) == 130
    line = capsys.readouterr().err
    assert line == f"pc-triton: stopped at step 13: continue with --resume --out {tmp_path / 'parts'}\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert checkpoint.load(tmp_path / "parts")[1]["step"] == 13
    assert main(["train", "--resume", "--out", str(tmp_path / "parts"), "--device", "cpu"]) == 0
    straight, record = checkpoint.load(tmp_path / "straight")
    parts, record_of_parts = checkpoint.load(tmp_path / "parts")
    assert [row["step"] for row in record.pop("speed")] == [row["step"] for row in record_of_parts.pop("speed")]
    assert record == record_of_parts
    assert straight.keys() == parts.keys()
    for name, t in straight.items():
        assert torch.equal(t, parts[name]), name


def test_resume_of_a_finished_run_and_more_steps(tmp_path, run, capsys):
    shutil.copytree(run, tmp_path / "run")
    resume = ["train", "--resume", "--out", str(tmp_path / "run"), "--device", "cpu"]
    before = (tmp_path / "run" / checkpoint.NAME).read_bytes()
    assert main(resume) == 0
    assert (tmp_path / "run" / checkpoint.NAME).read_bytes() == before
    assert main([*resume, "--steps", "22"]) == 0
    assert checkpoint.load(tmp_path / "run")[1]["step"] == 22


def test_resume_where_it_was_stopped_with_no_step_to_go(tmp_path, data, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main(train_arguments(data, tmp_path)) == 130
    assert main(["train", "--resume", "--out", str(tmp_path), "--device", "cpu", "--steps", "3"]) == 0
    assert [row["step"] for row in checkpoint.load(tmp_path)[1]["evaluations"]] == [3]
    assert (tmp_path / "curves.png").is_file()


def test_generate(run, capsys):
    def generated(*more):
        arguments = ["generate", "--checkpoint", str(run), "--prompt", "a dog ü", "--tokens", "30", *more]
        assert main(arguments) == 0
        return capsys.readouterr().out

    assert generated("--seed", "1") == generated("--seed", "1") != generated("--seed", "2")
    greedy = generated("--temperature", "0")
    assert greedy == generated("--top-k", "1", "--seed", "5") == generated("--temperature", "1e-320")
    assert greedy.startswith("a dog ü")


def test_evaluation_of_another_text(tmp_path, run, capsys):
    other = tmp_path / "other.txt"
    other.write_text("completely different words, unlike those before\n" * 30, encoding="utf-8")
    assert main(["eval", "--checkpoint", str(run), "--data", str(other), "--device", "cpu"]) == 0
    assert "held-out perplexity per token" in capsys.readouterr().out


def test_perplexity_makes_few_logits_at_once(monkeypatch):
    model = training.build(Settings(width=16, heads=2, blocks=1, context=8, vocabulary=300))[0]
    tokens = torch.randint(300, (100,))
    seen = []
    model.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))
    whole = evaluate.perplexity(model, tokens)
    monkeypatch.setattr(evaluate, "LOGITS", 2 * 8 * (300 + 8))
    assert evaluate.perplexity(model, tokens) == pytest.approx(whole, rel=12 * torch.finfo(torch.float32).eps)
    assert seen == [12, 2, 2, 2, 2, 2, 2]


def test_the_unigram_model():
    counts = torch.tensor([3, 0, 1])
    q = (counts + 1) / 7
    tokens = torch.tensor([2, 0, 1, 0, 2])
    expected = torch.exp(-q[tokens[1:]].log().mean())
    assert evaluate.unigram_perplexity(counts, tokens, 2) == pytest.approx(float(expected))


# What does not.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is empty: give a file with text"),
        (b" \n\n", "is empty: give a file with text"),
        (b"good \xff\xfe bad" * 100, "not UTF-8 at byte 5"),
        (b"a few words", "yields"),
        (b"abcdefghijkl" * 50, "yields"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, capsys, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in failure(capsys, train_arguments(path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--method hebb", "invalid choice"),
        ("--frobnicate", "unrecognized arguments"),
        ("--steps many", "invalid int value"),
        ("--steps 0", "steps=0"),
        ("--batch -1", "batch=-1"),
        ("--micro-batch 0", "micro_batch=0"),
        ("--micro-batch 2 --order incremental", "every inference step of the whole batch: use another --order"),
        ("--inference-steps 0", "inference_steps=0"),
        ("--displacement 1.5", "displacement=1.5"),
        ("--precision much", "precision=much: give auto, or a positive"),
        ("--precision -1", "precision=-1"),
        ("--state-dtype float16", "invalid choice"),
        ("--dtype float16", "invalid choice"),
        ("--compile --checkpointing", "compile: leave out --checkpointing"),
        ("--compile --order incremental", "compile: leave out --checkpointing and --order incremental"),
        ("--profile --steps 3", "3 steps are left, and a trace needs 5: give more --steps"),
        ("--state-dtype bfloat16 --order sweep", "use order='error', or float32 states"),
        ("--inference-dtype float8_e4m3fn --order sweep", "use order='error', or inference_dtype=None"),
        ("--inference-dtype float8", "invalid choice"),
        ("--held-out missing.txt", "No such file"),
        ("--lr nan", "lr=nan"),
        ("--lr 0", "lr=0.0"),
        ("--seed -1", "seed=-1"),
        (f"--seed {2**63}", "below 2**63"),
        (f"--batch {10**30}", "below 2**31"),
        ("--heads 3", "width=16 is no multiple of heads=3: give a width"),
        ("--resume --overwrite", "not allowed with argument"),
        ("--vocabulary 100", "at least 256"),
        ("--vocabulary 50000", "yields"),
        ("--context 100000", "give more text or a smaller --context"),
        ("--lr 1e30", "not finite"),
        ("--resume", "no such checkpoint"),
    ],
)
def test_settings_out_of_range(tmp_path, data, capsys, more, message):
    assert message in failure(capsys, train_arguments(data, tmp_path / "run", more))
    assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_memory(tmp_path, data, capsys, monkeypatch, error):
    def build(settings):
        raise error

    monkeypatch.setattr(training, "build", build)
    assert "out of memory: train with a smaller --micro-batch, --batch" in failure(
        capsys, train_arguments(data, tmp_path)
    )
    assert os.listdir(tmp_path) == []


def test_no_command(capsys):
    assert "required" in failure(capsys, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_device_that_is_not_there(tmp_path, data, run, capsys):
    arguments = [*train_arguments(data, tmp_path / "run"), "--device", "cuda"]
    assert "no CUDA GPU" in failure(capsys, arguments)
    assert "no CUDA GPU" in failure(capsys, ["eval", "--checkpoint", run, "--device", "cuda"])


def test_a_run_is_not_replaced_unasked(tmp_path, data, run, capsys):
    before = (run / checkpoint.NAME).read_bytes()
    assert "already holds a run" in failure(capsys, train_arguments(data, run))
    assert (run / checkpoint.NAME).read_bytes() == before
    shutil.copytree(run, tmp_path / "copy")
    assert main(train_arguments(data, tmp_path / "copy", "--overwrite --steps 2")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--width", "32"], "--width 16, not 32: leave it out"),
        (["--method", "bp"], "--method pc, not bp: leave it out"),
        (["--steps", "5"], "at step 20 already"),
        (["--dtype", "bfloat16"], "--dtype float32, not bfloat16: leave it out"),
        (["--data", __file__], "the text is not the one"),
    ],
)
def test_resume_of_another_configuration(run, capsys, more, message):
    before = (run / checkpoint.NAME).read_bytes()
    assert message in failure(capsys, ["train", "--resume", "--out", run, *more])
    assert (run / checkpoint.NAME).read_bytes() == before


def test_checkpoints_that_cannot_be_used(tmp_path, run, capsys):
    path = tmp_path / checkpoint.NAME
    whole = (run / checkpoint.NAME).read_bytes()
    tensors, record = checkpoint.load(run)
    use = (["eval", "--checkpoint", path], ["generate", "--checkpoint", path, "--prompt", "the"])
    use = (*use, ["train", "--resume", "--out", tmp_path])
    for arguments in use:
        assert "no such checkpoint" in failure(capsys, arguments)
        path.write_bytes(whole[: len(whole) // 2])
        assert "truncated" in failure(capsys, arguments)
        save_file(load_file(run / checkpoint.NAME), path)
        assert "no checkpoint of" in failure(capsys, arguments)
        checkpoint.save(path, tensors, record | {"settings": record["settings"] | {"width": 32}})
        assert "do not fit its settings" in failure(capsys, arguments)
        checkpoint.save(path, tensors, record | {"settings": {"size": 3}})
        assert "another version" in failure(capsys, arguments)
        path.unlink()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "a", "--seed", str(2**63)], "below 2**63"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "\udcff"], "not UTF-8"),
        (["--prompt", "a", "--tokens", "0"], "tokens=0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "a", "--top-k", "-3"], "top_k=-3"),
        ([], "required: --prompt"),
    ],
)
def test_generation_out_of_range(run, capsys, more, message):
    assert message in failure(capsys, ["generate", "--checkpoint", run, *more])


def test_a_folder_that_cannot_be_written(tmp_path, data, capsys, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot make the folder" in failure(capsys, train_arguments(data, tmp_path / "file"))

    def refused(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refused)
    assert "Permission denied" in failure(capsys, train_arguments(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up(tmp_path, data, capsys, monkeypatch):
    """The checkpoint of step 10 stays; that of step 20 is not written at all."""
    original, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(1)
        if len(calls) > 4:  # the probe and the first checkpoint, and their folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert "No space left on device: free space" in failure(capsys, train_arguments(data, tmp_path))
    assert os.listdir(tmp_path) == [checkpoint.NAME]
    assert checkpoint.load(tmp_path)[1]["step"] == 10
    assert main(["train", "--resume", "--out", str(tmp_path), "--device", "cpu", "--quiet"]) == 0


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_a_file_larger_than_the_system_allows(tmp_path, data, capsys):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        line = failure(capsys, train_arguments(data, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large: free space" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
def test_standard_output_that_is_full(run, capsys, monkeypatch):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        line = failure(capsys, ["generate", "--checkpoint", run, "--prompt", "a", "--tokens", "1"])
    assert "cannot print: No space left on device: free space" in line


def test_a_path_that_is_too_long(tmp_path, data, capsys):
    path = tmp_path / ("x" * 300)
    assert "File name too long: choose another --out" in failure(capsys, train_arguments(data, path))
    assert "File name too long: choose another path" in failure(capsys, ["eval", "--checkpoint", path])
    assert "File name too long: give a readable text file" in failure(capsys, train_arguments(path, tmp_path / "run"))


# Two runs in one folder.


@pytest.mark.parametrize(
    ("holds", "more"), [("nothing", ""), ("a run", ""), ("a run", "--resume"), ("a run", "--overwrite")]
)
def test_two_runs_in_one_folder(tmp_path, data, run, capsys, holds, more):
    """The second is refused, whatever it asks for, and leaves all as it was; after the first it may run."""
    folder = tmp_path / "run"
    if holds == "a run":
        shutil.copytree(run, folder)
    with run_files.locked(folder):
        before = sorted(os.listdir(folder))
        line = failure(capsys, train_arguments(data, folder, more))
        assert f"another run is writing to {folder}: wait for its end, or choose another --out" in line
        assert sorted(os.listdir(folder)) == before
    assert folder.exists() == (holds == "a run")


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux")
def test_a_killed_run_locks_nothing(tmp_path, data):
    process = command(*train_arguments(data, tmp_path, "--steps 100000"))
    wait_for_checkpoint(tmp_path, process)
    assert (tmp_path / run_files.LOCK).exists()
    with pytest.raises(InputError, match="another run is writing"), run_files.locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / run_files.LOCK).exists()
    step = checkpoint.load_record(tmp_path)["step"] + 2
    assert main(["train", "--resume", "--out", str(tmp_path), "--device", "cpu", "--steps", str(step)]) == 0
    assert sorted(os.listdir(tmp_path)) == [checkpoint.NAME, "curves.png"]


@pytest.mark.parametrize("without", ["locks", "fcntl"])
def test_a_system_without_locks(tmp_path, data, capsys, monkeypatch, without):
    """Some network file systems, and Windows: the run says so, and goes on."""

    def flock(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if without == "locks":
        monkeypatch.setattr(run_files.fcntl, "flock", flock)
    else:
        monkeypatch.setattr(run_files, "fcntl", None)
    assert main(train_arguments(data, tmp_path, "--steps 2")) == 0
    assert f"warning: {tmp_path} has no locks: see that no other run writes there" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == [checkpoint.NAME, "curves.png"]


def test_a_lock_file_removed_before_it_is_locked(tmp_path, monkeypatch):
    """The run before removes it on its way out: the lock would be on a file that nobody else opens."""
    flock, calls = run_files.fcntl.flock, []

    def late(file, how):
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / run_files.LOCK).unlink()
        flock(file, how)

    monkeypatch.setattr(run_files.fcntl, "flock", late)
    with run_files.locked(tmp_path) as locks:
        assert locks
        assert len(calls) == 2
        assert (tmp_path / run_files.LOCK).exists()


# One line, and status 2.


@pytest.mark.parametrize("path", ["", ".", "..", "/", "folder", "missing/page.html", "a\0b", "x" * 300, "device"])
def test_a_page_that_cannot_be_written(tmp_path, run, capsys, monkeypatch, path):
    """It is refused before anything is measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "device")
    monkeypatch.setattr(evaluate, "perplexity", None)
    before = sorted(os.listdir())
    failure(capsys, ["eval", "--checkpoint", run, "--html", path])
    assert sorted(os.listdir()) == before


def test_a_page_of_a_long_name(tmp_path, run):
    path = tmp_path / ("x" * 250 + ".html")
    assert main(["eval", "--checkpoint", str(run), "--html", str(path), "--device", "cpu"]) == 0
    assert path.read_text(encoding="utf-8").startswith("<!")


@pytest.mark.parametrize("option", ["--out", "--data", "--held-out", "--stream"])
@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_that_is_none(tmp_path, data, capsys, monkeypatch, option, path):
    monkeypatch.chdir(tmp_path)
    failure(capsys, [*train_arguments(data, tmp_path / "run"), option, path])
    assert os.listdir() == []


@pytest.mark.skipif(os.name != "posix", reason="a shell")
@pytest.mark.parametrize("arguments", ["generate --prompt a --checkpoint {}", "eval --checkpoint {}", "train --help"])
def test_closed_standard_streams(run, arguments):
    line = f"'{sys.executable}' -m pc_triton.cli {arguments.format(run)}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}

    def shell(line):
        return subprocess.run(line, shell=True, env=environment, capture_output=True, text=True)

    closed = shell(f"{line} >&-")
    assert closed.returncode == 2
    problem = "pc-triton: error: cannot print: standard output is closed"
    assert closed.stderr == f"{problem}: open it, as with `> /dev/null`\n"
    if Path("/dev/full").exists():
        full = shell(f"{line} >/dev/full")
        assert full.returncode == 2
        assert full.stderr.startswith("pc-triton: error: cannot print: No space left on device: ")
        assert full.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="a shell")
def test_errors_without_standard_error(tmp_path):
    """They go nowhere, and not among the results."""
    line = f"'{sys.executable}' -m pc_triton.cli eval --checkpoint {tmp_path} 2>&-"
    done = subprocess.run(line, shell=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux")
@pytest.mark.parametrize("how", ["module", "script"])
@pytest.mark.parametrize("moment", ["libtorch_cpu", "tokenizers"])
def test_ctrl_c_in_the_first_second(tmp_path, how, moment):
    """While torch is imported, and while what the commands need is."""
    (tmp_path / "pc-triton").write_text("import sys\nfrom pc_triton.cli import main\nsys.exit(main())\n")
    line = ["-m", "pc_triton.cli"] if how == "module" else [str(tmp_path / "pc-triton")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, *line, "train", "--steps", "100000", "--out", str(tmp_path / "run")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while moment not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stdout, stderr) == (130, "", "pc-triton: stopped\n")


def test_text_that_has_changed_since(tmp_path, data, capsys):
    """Its held-out part would no longer be held out."""
    text = tmp_path / "text.txt"
    shutil.copy(data, text)
    assert main(train_arguments(text, tmp_path / "run", "--steps 2")) == 0
    text.write_text("a line more\n" + TEXT, encoding="utf-8")
    resume = ["train", "--resume", "--out", tmp_path / "run"]
    assert "the text is not the one" in failure(capsys, resume)
    text.unlink()
    assert "No such file" in failure(capsys, resume)
    assert main(["eval", "--checkpoint", str(tmp_path / "run")]) == 0, "the checkpoint has what was held out"


def test_a_loss_that_is_not_finite(tmp_path, data, capsys, monkeypatch):
    original, calls = training.losses, []

    def losses(*arguments):
        calls.append(1)
        yield from (loss * float("nan") if len(calls) == 14 else loss for loss in original(*arguments))

    monkeypatch.setattr(training, "losses", losses)
    line = failure(capsys, train_arguments(data, tmp_path))
    remedy = "train with a --lr below 0.002, and --overwrite or another --out; the earlier checkpoint is kept in"
    assert f"at step 14 the loss is not finite (nan): {remedy}" in line
    assert checkpoint.load(tmp_path)[1]["step"] == 10


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (
            "1e30",
            "at step 2 the loss is not finite (nan), first in node 'blocks.0.attn': train with a --lr below 1e+30",
        ),
        ("10", "times the first (5."),
    ],
)
def test_divergence(tmp_path, data, capsys, lr, message):
    """Weights that overflow name the node where they do; a loss that only rises has a bound."""
    assert message in failure(capsys, train_arguments(data, tmp_path, f"--lr {lr}"))
    assert os.listdir(tmp_path) == []


def test_a_held_out_perplexity_out_of_bounds(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr(training, "perplexity", lambda *arguments: 1e30)
    line = failure(capsys, train_arguments(data, tmp_path))
    assert "at step 10 the held-out perplexity is 1e+30: train with a --lr below 0.002" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_that_are_not_installed(capsys, monkeypatch, extra):
    for module in [name for name in sys.modules if name.partition(".")[0] == extra]:
        monkeypatch.delitem(sys.modules, module)
    for module in ("train", "build", "data", "evaluate", "run_files", "checkpoint"):
        monkeypatch.delitem(sys.modules, f"pc_triton.{module}")
        monkeypatch.delattr(f"pc_triton.{module}")
    monkeypatch.setitem(sys.modules, extra, None)
    assert f"{extra} is not installed: pip install" in failure(capsys, ["eval"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_a_terminal(tmp_path, data, number):
    """A real signal to a real process, somewhere in a run too long to end."""
    process = command(*train_arguments(data, tmp_path, "--steps 100000"))
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130
    assert stderr.startswith("pc-triton: stopped at step ")
    assert stderr.count("\n") == 1
    assert checkpoint.load(tmp_path)[1]["step"] >= 10
    folder = stderr.strip().rpartition(" --out ")[2]
    assert checkpoint.load(shlex.split(folder)[0])[1]["step"] >= 10, "the folder that it names"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_process_killed_in_a_save(tmp_path, data, monkeypatch):
    """kill -9 at every line that writes a checkpoint, and within the write itself, then --resume: bit for bit."""
    saves, write = [], checkpoint.write

    def recorded(path, content):
        saves.extend([content] if path.name == checkpoint.NAME else [])
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", recorded)
        settings = "--method bp --quiet --eval-every 2 --steps 6"
        assert main(train_arguments(data, tmp_path / "straight", settings)) == 0
    before, after, _ = saves
    expected = checkpoint.load(tmp_path / "straight")
    del expected[1]["speed"]

    path = tmp_path / "killed" / checkpoint.NAME
    path.parent.mkdir()
    points, left = 0, set()
    cuts = [Bytes(k) for k in (0, 1, len(after) // 2, len(after) - 1)]
    for kill in itertools.chain(cuts, map(Lines, itertools.count())):
        path.write_bytes(before)
        child = os.fork()
        if child == 0:
            try:
                kill.install()
                write(path, after)
            finally:
                os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            assert isinstance(kill, Lines)
            break  # there are no more lines
        points += 1
        content = path.read_bytes()
        assert content in (before, after)
        if content not in left:  # what is gone on with is this file, and no other that was left
            left.add(content)
            assert main(["train", "--resume", "--out", str(path.parent), "--device", "cpu", "--quiet"]) == 0
            found = checkpoint.load(path)
            del found[1]["speed"]
            assert found[1] == expected[1]
            assert all(torch.equal(t, found[0][name]) for name, t in expected[0].items())
            assert sorted(os.listdir(path.parent)) == [checkpoint.NAME, "curves.png"]
    assert left == {before, after}
    assert points >= 15


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux")
def test_two_processes_one_of_which_is_killed(tmp_path, data, monkeypatch):
    """torchrun goes on with a run of one process, in micro-batches, as that would have; it ends when a process dies."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main(train_arguments(data, tmp_path / "one", "--steps 1000 --eval-every 5")) == 130
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    resume = ["train", "--resume", "--device", "cpu", "--out"]
    micro = ["--micro-batch", "1"]

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = command(*resume, tmp_path / "two", *micro, launcher=launcher)
    wait_for_checkpoint(tmp_path / "two", process, step=5)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in stderr
    assert stdout.count("pc in float32 on 2 x cpu") == 1, "one of them prints"

    two, record_of_two = checkpoint.load(tmp_path / "two")
    with monkeypatch.context() as patch:
        interrupt_at(patch, record_of_two["step"] - 3)
        assert main([*resume, str(tmp_path / "one")]) == 130
    one, record_of_one = checkpoint.load(tmp_path / "one")
    assert record_of_one["step"] == record_of_two["step"]
    assert torch.equal(one["rng.batches"], two["rng.batches"])
    rounding = 100 * torch.finfo(torch.float32).eps
    assert record_of_two["losses"] == pytest.approx(record_of_one["losses"], rel=rounding)
    row_of_one, row_of_two = (record["evaluations"][0] for record in (record_of_one, record_of_two))
    assert row_of_two["perplexity"] == pytest.approx(row_of_one["perplexity"], rel=rounding)
    assert main([*resume, str(tmp_path / "two"), "--steps", str(record_of_two["step"] + 1)]) == 0


@pytest.mark.skipif(os.name != "posix", reason="gloo")
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="its FSDP2 has no streams on a CPU")
@pytest.mark.parametrize("more", ["", "--method bp --micro-batch 1", "--order incremental"])
def test_a_sharded_run(tmp_path, data, capsys, more):
    """Two processes train as one does, and two, or one with the whole model, go on with their checkpoint."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def two(*arguments):
        _, stderr = command(*arguments, launcher=launcher).communicate(timeout=200)
        return stderr

    options = f"--steps 3 --eval-every 2 {more}"
    assert main(train_arguments(data, tmp_path / "one", options)) == 0
    expected = checkpoint.load(tmp_path / "one")[1]
    shutil.copytree(tmp_path / "one", tmp_path / "whole")
    stderr = two(*train_arguments(data, tmp_path / "two", f"{options} --shard"))
    tensors, record = checkpoint.load(tmp_path / "two")
    assert record["step"] == 3, stderr
    assert not [name for name in tensors if name.startswith(("model.", "optimizer."))]
    assert sorted(os.listdir(tmp_path / "two")) == [checkpoint.NAME, "curves.png", record["shards"]], stderr
    shutil.copytree(tmp_path / "two", tmp_path / "alone")

    resume = ["train", "--resume", "--device", "cpu", "--steps", "4", "--out"]
    stderr = two(*resume, tmp_path / "two", "--shard")
    assert main([*resume, str(tmp_path / "alone")]) == 0
    assert sorted(os.listdir(tmp_path / "alone")) == [checkpoint.NAME, "curves.png"]
    for folder in ("two", "alone"):
        losses = checkpoint.load(tmp_path / folder)[1]["losses"]
        assert len(losses) == 4 * len(expected["losses"]) // 3, stderr
        assert losses[: len(expected["losses"])] == pytest.approx(expected["losses"], rel=1e-4)
    assert checkpoint.load(tmp_path / "two")[1]["losses"] == pytest.approx(losses, rel=1e-5)
    one, alone = (build.load(tmp_path / folder, "cpu").model for folder in ("two", "alone"))
    for a, b in zip(one.parameters(), alone.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(tmp_path / "two" / checkpoint.NAME), "--device", "cpu"]) == 0
    measured = capsys.readouterr().out.splitlines()[-1]
    assert f"{checkpoint.load(tmp_path / 'two')[1]['evaluations'][-1]['perplexity']:.2f}" in measured
    if not more:
        assert "was made without --shard: leave it out" in two(*resume, tmp_path / "whole", "--shard")
        shutil.rmtree(tmp_path / "two" / checkpoint.load_record(tmp_path / "two")["shards"])
        assert "is damaged or of another run: restore it" in failure(capsys, ["eval", "--checkpoint", tmp_path / "two"])


def test_one_process_has_no_shards(tmp_path, data, capsys):
    line = failure(capsys, train_arguments(data, tmp_path / "run", "--shard"))
    assert "there is one process alone: start several by torchrun, or leave --shard out" in line


def test_a_batch_that_does_not_divide(tmp_path, data, run, capsys, monkeypatch):
    monkeypatch.setattr(training.parallel, "processes", lambda: 3)
    line = failure(capsys, train_arguments(data, tmp_path))
    assert "batch=4 is no multiple of the 3 processes: give a --batch that is" in line
    line = failure(capsys, ["train", "--resume", "--out", run])
    assert "batch=4 is no multiple of the 3 processes: use a number of processes that divides it" in line


class Lines:
    """Kills this process at the k-th line that `checkpoint.write` runs."""

    def __init__(self, k):
        self.left = k

    def install(self):
        sys.settrace(self.trace)

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
        return self.trace


class Bytes:
    """Kills this process when `checkpoint.write` has written k bytes."""

    def __init__(self, k):
        self.k = k

    def install(self):
        checkpoint.open = self.open

    def open(self, path, mode):
        self.file = open(path, mode, buffering=0)  # noqa: SIM115
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(content[: self.k])
        os.kill(os.getpid(), signal.SIGKILL)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_evaluation_shows_its_progress_on_a_terminal_alone(run, data, capsys, monkeypatch):
    """Bars for tokenising, perplexity and report go to stderr and are wiped; what stdout gets is the same."""
    monkeypatch.setattr("pc_triton.text.DELAY", 0.0)
    line = ["eval", "--checkpoint", str(run), "--data", str(data), "--device", "cpu"]
    assert main(line) == 0
    piped = capsys.readouterr()
    assert piped.err == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(line) == 0
    shown, left = sys.stderr.getvalue(), sys.stderr.getvalue().split("\r")[-2]
    assert [what for what in ("encoding", "perplexity", "report") if f"{what}:   0%" not in shown] == []
    assert left.strip() == ""
    assert capsys.readouterr().out == piped.out


def test_ctrl_c_while_a_bar_shows(run, monkeypatch):
    """The bar is wiped before the line that says so."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pc_triton.text.DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(evaluate.F, "cross_entropy", interrupted)
    assert main(["eval", "--checkpoint", str(run), "--device", "cpu"]) == 130
    *bars, last = sys.stderr.getvalue().split("\r")
    assert "perplexity" in bars[1]
    assert last == "pc-triton: stopped\n"


def test_experiments_show_no_bars_in_a_log():
    bench = Path(__file__).parents[1] / "bench"
    calls = [call for path in bench.glob("*.py") for call in re.findall(r"(?:tqdm|progress)\(.*", path.read_text())]
    assert len(calls) > 5
    assert not [call for call in calls if "disable=None" not in call]


def test_ctrl_c_outside_of_training(run, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "generate", interrupted)
    assert main(["generate", "--checkpoint", str(run), "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "pc-triton: stopped\n"


def test_settings_from_python():
    with pytest.raises(InputError, match="method=x: choose one of"):
        Settings(method="x")
    with pytest.raises(InputError, match=r"width=3\.5"):
        Settings(width=3.5)


@pytest.mark.parametrize("order", orders.ORDERS)
def test_the_steps_of_inference_are_the_orders_own(order):
    assert Settings(order=order).inference_steps == orders.ORDERS[order].steps
    assert Settings(order=order, inference_steps=7).inference_steps == 7


def test_a_held_out_text_of_its_own(tmp_path, data, capsys):
    """All of --data is trained on, all of --held-out measured; evaluation finds it again."""
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("another text to measure on\n" * 20, encoding="utf-8")
    assert main(train_arguments(data, tmp_path / "run", f"--steps 2 --held-out {held_out}")) == 0
    trained = capsys.readouterr().out.splitlines()[-1]
    assert main(["eval", "--checkpoint", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == trained
    held_out.write_text("a text that has changed\n" * 20, encoding="utf-8")
    assert "the text is not the one" in failure(capsys, ["train", "--resume", "--out", tmp_path / "run"])


def gradients(settings, micro_batch):
    """The loss of a training step in float64, and its gradients."""
    torch.manual_seed(0)
    model, free_energy = training.build(settings)
    model.double()
    x, y = torch.randint(300, (2, 7, settings.context), generator=torch.Generator().manual_seed(1))
    learner = training.parallel.replicate(model, free_energy)
    (loss,) = training.backward(learner, free_energy, x, y, micro_batch)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("size", [1, 3, 7, 50])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "bp"},
        {},
        {"inference_steps": 5},
        {"order": "sweep"},
        {"order": "simultaneous"},
        {"method": "gaussian-pc"},
    ],
    ids=str,
)
def test_micro_batches_are_the_whole_batch(options, size):
    settings = Settings(width=16, heads=2, blocks=1, context=8, vocabulary=300, **options)
    loss, grad = gradients(settings, size)
    whole_loss, whole_grad = gradients(settings, None)
    rounding = 32 * torch.finfo(torch.float64).eps  # the sums over the batch are made in another order
    assert float(loss) == pytest.approx(float(whole_loss), rel=rounding)
    assert float((grad - whole_grad).norm()) <= rounding * float(whole_grad.norm())


def test_micro_batches_hold_fewer_sequences(tmp_path, data, monkeypatch):
    """Each pass has as many as were asked for, also where they do not divide the batch, and in reports."""
    original, seen = training.losses, []

    def losses(learner, free_energy, x, *more):
        seen.append(len(x))
        return original(learner, free_energy, x, *more)

    monkeypatch.setattr(training, "losses", losses)
    monkeypatch.setattr(
        training, "regime", lambda f, t, context, n, _: seen.append(n) or evaluate.regime(f, t, context, n)
    )
    assert main(train_arguments(data, tmp_path, "--micro-batch 3 --steps 2 --quiet")) == 0
    assert seen == [3, 1, 3, 1, 1, 1]


def test_inference_in_8_bits(tmp_path, data):
    """It trains, resumes, and is refused where states are u."""
    given = train_arguments(data, tmp_path / "run", "--inference-dtype float8_e4m3fn --steps 2")
    assert main(given) == 0
    _, free_energy, *_ = build.load(tmp_path / "run", "cpu")
    assert free_energy.inference_dtype == torch.float8_e4m3fn
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "3"]) == 0
    plain = train_arguments(data, tmp_path / "plain", "--steps 2")
    assert main(plain) == 0
    perplexities = [checkpoint.load(tmp_path / name)[1]["evaluations"][0]["perplexity"] for name in ("run", "plain")]
    assert perplexities[0] != perplexities[1]


def test_states_in_bfloat16(tmp_path, data, run):
    """They train; a checkpoint from before the setting was there has float32's and is used as ever."""
    assert main(train_arguments(data, tmp_path / "run", "--state-dtype bfloat16 --steps 2")) == 0
    _, free_energy, *_ = build.load(tmp_path / "run", "cpu")
    assert free_energy.state_dtype == torch.bfloat16
    tensors, record = checkpoint.load(run)
    del record["settings"]["state_dtype"]
    checkpoint.save(tmp_path / checkpoint.NAME, tensors, record)
    assert build.load(tmp_path, "cpu")[1].state_dtype in (None, torch.float32)
    assert main(["train", "--resume", "--out", str(tmp_path), "--steps", "21"]) == 0


def test_memory_is_told_before_the_first_step(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda place: 10**5)
    assert main(train_arguments(data, tmp_path, "--steps 1")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("memory of a step: about 0.00")
    assert lines[2].endswith(" head")
    assert lines[3] == "warning: that is more than the 0.0001 GB free on cpu: give a smaller --micro-batch"
    assert main(train_arguments(data, tmp_path, "--steps 1 --overwrite --order incremental")) == 0
    assert "give a smaller --batch, --context, --width or --blocks" in capsys.readouterr().out
    assert main(train_arguments(data, tmp_path, "--steps 1 --quiet --overwrite")) == 0
    assert "memory of" not in capsys.readouterr().out


def test_a_fixed_precision():
    _, free_energy = training.build(training.Settings(width=16, heads=2, blocks=1, vocabulary=300, precision="10"))
    assert free_energy.precision == 10
