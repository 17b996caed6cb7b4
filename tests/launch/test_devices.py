"""One device per process: what `jaxcomm run` shows each rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxcomm.launch import devices
from tests.jobs import Launch

FOUR = {"JAXCOMM_GPUS": "4", "JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
# Ranks' lines may be cut into one another; files are not.
SHOW = (
    "import json, os, pathlib, sys\n"
    "names = ('CUDA_VISIBLE_DEVICES', 'XLA_CLIENT_MEM_FRACTION')\n"
    "rank = os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK', '0'))\n"
    "text = json.dumps([os.environ.get(name) for name in names])\n"
    "pathlib.Path(sys.argv[1], rank).write_text(text)\n"
)
Shown = Callable[..., list[list[str | None]]]


@pytest.fixture
def shown(job: Launch, tmp_path: Path) -> Shown:
    """Return a function that says what each rank's script saw."""

    def run(ranks: int, env: dict[str, str], *options: str) -> list[list[str | None]]:
        done = job(ranks, SHOW, str(tmp_path), env=env, options=options)
        assert done.returncode == 0, done.stderr
        files = [tmp_path / str(rank) for rank in range(ranks)]
        return [json.loads(file.read_text()) for file in files]

    return run


def test_each_rank_sees_its_own_device(shown: Shown) -> None:
    assert shown(2, FOUR) == [["0", None], ["1", None]]


def test_a_list_is_honoured_whatever_it_names(shown: Shown) -> None:
    names = "GPU-5c8f,MIG-e7a1"
    found = shown(2, FOUR | {"CUDA_VISIBLE_DEVICES": names})
    assert found == [["GPU-5c8f", None], ["MIG-e7a1", None]]


def test_ranks_take_turns_and_share_memory(shown: Shown) -> None:
    found = shown(3, FOUR | {"CUDA_VISIBLE_DEVICES": "3,1"})
    assert found == [["3", "0.375"], ["1", None], ["3", "0.375"]]


def test_memory_that_the_user_divided_stays(shown: Shown) -> None:
    env = FOUR | {"CUDA_VISIBLE_DEVICES": "2", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".2"}
    assert shown(2, env) == [["2", None], ["2", None]]


def test_binding_can_be_left_out(shown: Shown) -> None:
    listed = FOUR["CUDA_VISIBLE_DEVICES"]
    assert shown(2, FOUR, "--no-gpu-binding") == [[listed, None]] * 2


@pytest.mark.parametrize("name", ["JAXCOMM_GPUS", "JAX_PLATFORMS"])
def test_nothing_is_done_without_a_gpu_or_for_the_cpu(shown: Shown, name: str) -> None:
    env = FOUR | {name: {"JAXCOMM_GPUS": "0", "JAX_PLATFORMS": "cpu"}[name]}
    assert shown(1, env) == [[FOUR["CUDA_VISIBLE_DEVICES"], None]]


def test_a_rank_alone_sees_one_device(shown: Shown) -> None:
    assert shown(1, FOUR) == [["0", None]]


def test_devices_are_found_by_files(tmp_path: Path) -> None:
    driver, files = tmp_path / "driver", tmp_path / "dev"

    def count() -> int:
        return devices.present({}, driver, files)

    assert count() == 0
    for bus in ("0000:01:00.0", "0000:41:00.0", "0000:81:00.0"):
        (driver / "gpus" / bus).mkdir(parents=True)
    assert count() == 3  # no device files before CUDA first runs
    files.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (files / name).touch()
    assert count() == 2  # a container's


@pytest.mark.parametrize(
    ("listed", "want"),
    [
        (None, ["0", "1", "2"]),
        ("", []),
        ("-1", []),
        ("2, 0", ["2", "0"]),
        ("1,-1,0", ["1"]),
        ("NoDevFiles", []),
    ],
)
def test_visible_devices(listed: str | None, want: list[str]) -> None:
    env = {"JAXCOMM_GPUS": "3"}
    if listed is not None:
        env["CUDA_VISIBLE_DEVICES"] = listed
    assert devices.visible(env) == want


def test_jax_platforms_decide() -> None:
    for platforms, want in (("", True), ("cuda,cpu", True), ("cpu", False)):
        assert devices.wanted({"JAX_PLATFORMS": platforms}) is want
    assert devices.wanted({})


def test_under_srun_the_worker_binds_too() -> None:
    env = {"JAXCOMM_GPUS": "4", "SLURM_LOCALID": "2"}
    # jax.distributed would ask for the third of one device.
    want = {"CUDA_VISIBLE_DEVICES": "2", "JAX_LOCAL_DEVICE_IDS": "0"}
    assert devices.settings(env) == want
    assert devices.settings(env | {"JAXCOMM_GPU_BINDING": "off"}) == {}
