"""Jobs that fail and start again, and jobs that are asked to end."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxcomm import checkpoint
from jaxcomm.errors import InvalidOptionError
from stemdl.data import dataset
from stemdl.data.cache import data_config
from stemdl.evaluation.metrics import nrmse
from stemdl.model.network import NETWORKS
from stemdl.training import parameters
from stemdl.training.monitor import Predictor
from tests.jobs import ROOT, Launch, documented

pytestmark = pytest.mark.long

FAILING = r"""
import os, re, signal, subprocess, sys, time
from mpi4py import MPI

comm, attempt = MPI.COMM_WORLD, int(os.environ["JAXCOMM_RESTART"])
comm.Barrier()
segments = set(re.findall(r"/dev/shm/\S+", open("/proc/self/maps").read()))
log = open(f"{sys.argv[1]}/log{attempt}.{comm.rank}", "w")
print("segments", *segments, file=log, flush=True)
if comm.rank == 1:
    command = ["sleep", "1000"]
    null = subprocess.DEVNULL
    # Not in the job's process group, and its parent dies.
    child = subprocess.Popen(command, start_new_session=True, stdout=null, stderr=null)
    print("orphan", child.pid, file=log, flush=True)
comm.Barrier()
if attempt == 0 and comm.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == 1 and comm.rank == 0:
    os.kill(os.getppid(), signal.SIGKILL)  # mpiexec, which then tidies nothing
if attempt == 2:
    raise ValueError("on purpose")
if attempt == 3:
    os.kill(child.pid, signal.SIGKILL) if comm.rank == 1 else None
    print("finished", flush=True)
    sys.exit(0)
time.sleep(100)
"""


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ranks_of(mark: str) -> list[int]:
    """Return the rank processes whose command line holds `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().split(b"\0")
        except OSError:
            continue
        worker = line[1:3] == [b"-m", b"jaxcomm.launch.worker"]
        if worker and any(mark.encode() in part for part in line):
            found.append(int(path.parent.name))
    return found


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxcomm", "run", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAXCOMM_PROFILE": "off"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """End what a failed test has left running, all of it."""
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)


def test_a_failed_job_starts_again_without_what_it_left(
    job: Launch, tmp_path: Path
) -> None:
    done = job(2, FAILING, str(tmp_path), options=["--max-restarts", "3"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished") == 2
    lines = [line for line in done.stderr.splitlines() if "; restart " in line]
    assert len(lines) == 3, done.stderr
    for number, line in enumerate(lines, 1):
        assert f"restart {number} of 3" in line
        assert f"script.py {tmp_path} ended with exit code" in line
    assert re.search("exit code (137|9) after", lines[0])  # Open MPI's or MPICH's
    assert "exit code 1 after" in lines[2]
    logs = [path.read_text() for path in tmp_path.glob("log*")]
    words = [line.split() for text in logs for line in text.splitlines()]
    orphans = [int(line[1]) for line in words if line[:1] == ["orphan"]]
    assert len(orphans) == 4
    assert not [pid for pid in orphans if alive(pid)]
    segments = [name for line in words if line[:1] == ["segments"] for name in line[1:]]
    assert not [name for name in segments if os.path.exists(name)]


@pytest.mark.parametrize(
    ("body", "options", "code", "attempts"),
    [
        ("sys.exit(3)", ["--max-restarts", "1"], 3, 2),
        ("sys.exit(0 if attempt else 5)", ["--max-restarts", "4"], 0, 2),
        ("sys.exit(2)", ["--max-restarts", "2"], 2, 1),
        ("time.sleep(60)", ["--max-restarts", "2", "--timeout", "2"], 124, 1),
        # The time is that of all attempts.
        (
            "time.sleep(1); sys.exit(1)",
            ["--max-restarts", "99", "--timeout", "3"],
            124,
            0,
        ),
    ],
)
def test_what_starts_again(
    tmp_path: Path, body: str, options: list[str], code: int, attempts: int
) -> None:
    script = tmp_path / "script.py"
    head = "import os, sys, time\nattempt = int(os.environ['JAXCOMM_RESTART'])\n"
    script.write_text(f"{head}print('attempt', attempt, flush=True)\n{body}\n")
    process = start("-n", "1", *options, script)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    made = out.count("attempt")
    assert made == attempts if attempts else 2 <= made < 10, err
    assert err.count("; restart ") == made - 1


STOPPING = """
import atexit, pathlib, sys, time
import jax, numpy as np, jaxcomm
from jaxcomm.data import Batches

main, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
comm = jaxcomm.init()
folder, lr, steps, key = main / "saved", 0.1, 100_000, jax.random.key(1)
state, batches = np.zeros(1), Batches(8, 4)
atexit.register(time.sleep, seconds)  # slow to end

def train_step(state, rows):
    time.sleep(0.01 * (1 + comm.rank))
    if state[0] == 20:
        (main / f"ready{comm.rank}").touch()
    return state + 1
"""


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "launcher"),
        pytest.param(signal.SIGINT, "launcher", marks=pytest.mark.thorough),
        (signal.SIGTERM, "rank"),
    ],
)
def test_a_signal_ends_all_ranks_after_the_same_step(
    tmp_path: Path, number: signal.Signals, to: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(STOPPING + documented("Restart"))
    # mpiexec would have killed the ranks before that.
    seconds = "3" if number == signal.SIGTERM and to == "launcher" else "0"
    process = start("-n", "2", "--max-restarts", "1", script, tmp_path, seconds)
    try:
        wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2)
        pids = [process.pid] if to == "launcher" else ranks_of(str(script))[:1]
        for pid in pids:
            os.kill(pid, number)
        _, err = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 0, err
    # `save` has refused it if the ranks were at different steps.
    like = (0, np.zeros(1), jax.random.key(0))
    found = checkpoint.restore(tmp_path / "saved", like)
    assert found is not None and found.step % 10 == 0 and found.step >= 20
    step, state, key = found.state
    assert found.step == step == state[0]
    assert jax.random.key_data(key)[1] == 1
    assert checkpoint.steps(tmp_path / "saved") == [found.step]
    assert ("SIG" in err) == (to == "launcher")


@pytest.mark.parametrize(
    ("ranks", "options", "signals", "code"),
    [
        ("2", [], [signal.SIGINT, signal.SIGINT], 130),
        ("1", ["--grace", "1"], [signal.SIGTERM, signal.SIGTERM], 143),
    ],
)
def test_ranks_that_do_not_end_are_killed(
    tmp_path: Path,
    ranks: str,
    options: list[str],
    signals: Sequence[signal.Signals],
    code: int,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, os, signal, sys, time\n"
        "for s in (signal.SIGTERM, signal.SIGINT):\n"
        "    signal.signal(s, signal.SIG_IGN)\n"
        "pathlib.Path(sys.argv[1], f'ready{os.getpid()}').touch()\n"
        "time.sleep(100)\n"
    )
    process = start("-n", ranks, "--max-restarts", "1", *options, script, tmp_path)
    try:
        wait_until(lambda: len(list(tmp_path.glob("ready*"))) == int(ranks))
        for number in signals:
            process.send_signal(number)
            time.sleep(0.5)
        assert process.poll() is None or len(options) == 0
        _, err = process.communicate(timeout=60)  # the ranks sleep for longer
    finally:
        end(process)
    assert process.returncode == code, err
    pids = [int(p.name.removeprefix("ready")) for p in tmp_path.glob("ready*")]
    wait_until(lambda: not any(map(alive, pids)), 5)


def test_stop_in_one_process(request: pytest.FixtureRequest) -> None:
    # A shell's background jobs, of which this may be one, are born deaf to Ctrl-C.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with checkpoint.Stop(every=2) as stop:
        assert not stop.requested(2)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received
        assert not stop.requested(3)
        assert stop.requested(4) and stop.requested(5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with pytest.raises(InvalidOptionError, match="every=0"):
        checkpoint.Stop(every=0)
    caught: list[Exception] = []

    def elsewhere() -> None:
        try:
            checkpoint.Stop()
        except InvalidOptionError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_stemdl_killed_and_asked_to_end_trains_as_without_a_break(
    tmp_path: Path,
) -> None:
    """Any sample does: the parameters must be bitwise equal, not good."""
    config, rng = data_config(8), np.random.default_rng(0)
    probes, pixels = config.optics.probes, config.optics.label_pixels
    x = rng.random((config.samples, probes, probes, 25, 25), np.float32)
    y = rng.normal(size=(config.samples, pixels, pixels)).astype(np.float32)
    names = np.array([config.material(k) for k in range(config.samples)])
    arrays = {"amplitudes": x, "labels": y, "material": names}
    dataset.save(config, arrays, tmp_path)
    command = ["-m", "stemdl", "train", "--network", "toy", "--data", tmp_path]
    command += ["--samples", 8, "--batch", 2, "--steps", 80, "--checkpoint-every", 4]
    command += ["--evaluate-every", 40, "--log-every", 10, "--tensorboard"]
    command += ["--set", "noise.least_dose=1e5"]

    def train(out: Path, *options: str, ranks: int = 2) -> subprocess.Popen[str]:
        line = ["-n", ranks, "--timeout", "120", "--max-restarts", "2", *command]
        return start(*map(str, [*line, "--out", out, *options]))

    def finish(process: subprocess.Popen[str], code: int = 0) -> str:
        _, err = process.communicate(timeout=150)
        assert process.returncode == code, err[-3000:]
        return err

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(train(whole))

    seed = random.randrange(1 << 30)

    def newest() -> int:
        return max(checkpoint.steps(broken / "checkpoints"), default=0)

    print("seed of the kill:", seed)  # shown if the test fails
    chance = random.Random(seed)
    process = train(broken)
    try:
        # A random rank, at a random moment, then the launcher is asked to end the rest.
        last = chance.randrange(1, 4)
        wait_until(lambda: newest() >= 4 * last, 100)
        time.sleep(chance.random() * 0.3)
        killed = ranks_of(str(broken))
        os.kill(chance.choice(killed), signal.SIGKILL)
        wait_until(lambda: not any(map(alive, killed)))
        before = newest()
        wait_until(lambda: newest() > before, 100)
        process.send_signal(signal.SIGTERM)
        err = finish(process)
    finally:
        end(process)
    assert "restart 1 of 2" in err and "restart 2" not in err, err
    assert err.count("ended on request after step") == 2, err
    assert not (broken / "params.npz").exists()
    step = newest()

    # Other settings are refused, and not tried again.
    err = finish(train(broken, "--lr", "0.1", ranks=1), 2)
    assert "lr is 0.1 and was 0.003" in err and "restart 1" not in err
    assert newest() == step < 80

    finish(train(broken))
    for name in ("params.npz", "params_20.npz"):
        with np.load(whole / name) as a, np.load(broken / name) as b:
            assert a.files == b.files
            for key in a.files:
                assert a[key].tobytes() == b[key].tobytes(), key
    reports = [json.loads((out / "train.json").read_text()) for out in (whole, broken)]
    assert reports[0]["losses"] == reports[1]["losses"]
    assert len(reports[0]["losses"]) == 80
    logs = [_rows(out / "metrics.csv") for out in (whole, broken)]
    for rows in logs:
        assert [step for step in rows if step % 10 == 0] == list(range(10, 81, 10))
        assert all(float(row["communication_ms"]) > 0 for row in rows.values())
    for step in (40, 80):
        scores = [rows[step]["held_out_nrmse"] for rows in logs]
        assert scores[0] == scores[1]
    # What two ranks have scored in shares, once more in one piece.
    loaded = dataset.load(config, tmp_path)
    model = NETWORKS["toy"].clone(pixels=pixels)
    patterns = loaded.test_x
    shapes = jax.eval_shape(model.init, jax.random.key(0), patterns[:1])
    variables = parameters.load(whole / "params.npz", shapes)
    scored = nrmse(Predictor(model)(variables, patterns), loaded.test_y).mean()
    assert abs(scored - float(logs[0][80]["held_out_nrmse"])) < 1e-4 * scored


def _rows(path: Path) -> dict[int, dict[str, str]]:
    with path.open(newline="") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}
