"""`jaxcomm simulate` as a user meets it, its machines' files and its page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jaxcomm.errors import InvalidOptionError
from jaxcomm.launch.cli import main
from jaxcomm.simulate import (
    experiment,
    machines,
    report,
    tables,
    validation,
    workloads,
)
from tests.jobs import ROOT

QUICK = ["--ranks", "1,12,96", "--steps", "2", "--samples", "2"]


def simulate(*arguments: str | Path) -> Any:
    line = ["simulate", *QUICK, *map(str, arguments)]
    return CliRunner().invoke(main, line, catch_exceptions=False)


@pytest.fixture
def few_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate against one made-up anchor: the real ones take seconds."""
    row = validation.Row("anchor [x]", 2.0, 1.0, 0.5, 1.5, None, "")
    monkeypatch.setattr(validation, "check", lambda **_: [row])


def test_json_is_one_document_with_all_designs() -> None:
    done = simulate("--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    keys = ["design", "ranks", "efficiency", "step_ms", "control_ms", "exposed_comm_ms"]
    pairs = []
    for row in found["results"]:
        assert set(keys) <= set(row)
        low, high = row["efficiency_range"]
        assert 0 < low <= row["efficiency"] <= high <= 1.01
        pairs.append((row["ranks"], row["design"]))
    assert pairs == [(n, d) for n in (1, 12, 96) for d in experiment.DESIGNS]
    for row in found["validation"]:
        assert {"anchor", "published", "predicted", "fitted_parameter"} <= set(row)
    assert all(p["source"] for p in found["parameters"])


@pytest.mark.usefixtures("few_anchors")
def test_equal_arguments_give_equal_bytes() -> None:
    first = simulate("--json").stdout
    assert simulate("--json").stdout == first
    assert simulate("--json", "--seed", "1").stdout != first


@pytest.mark.usefixtures("few_anchors")
def test_tables_and_plot(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    done = simulate("--machine", "here", "--plot", plot)
    assert done.exit_code == 0, done.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    for word in (*experiment.DESIGNS, "published", "more ranks than the machine has"):
        assert word in done.stdout
    # To a file lines are whole: neither cut nor wrapped.
    assert "…" not in done.stdout and "\x1b" not in done.stdout


@pytest.mark.usefixtures("few_anchors")
def test_without_samples_there_are_no_ranges() -> None:
    found = json.loads(simulate("--json", "--samples", "0").stdout)
    assert {row["efficiency_range"] for row in found["results"]} == {None}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--machine", "sumit"], ["--machine sumit", "frontier", "summit"]),
        (["--workload", "bert"], ["--workload bert", "resnet50"]),
        (["--ranks", "0"], ["--ranks 0", "1 to"]),
        (["--ranks", "8,-3"], ["--ranks -3"]),
        (["--ranks", "8;9"], ["--ranks '8;9'", "commas"]),
        (["--ranks", "2000000"], ["--ranks 2000000", "1,000,000"]),
        (["--plot", "/no/such/folder/x.png"], ["--plot", "no folder"]),
        (["--plot", "/"], ["--plot /", "is a folder"]),
    ],
)
def test_bad_options_are_named(arguments: list[str], says: list[str]) -> None:
    done = simulate(*arguments)
    assert done.exit_code == 1
    assert all(word in done.output for word in says), done.output
    assert "Traceback" not in done.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    done = simulate("--plot", tmp_path / "x.png")
    assert done.exit_code == 1
    assert "not writable" in done.output


# --- machines


@pytest.mark.usefixtures("few_anchors")
def test_a_machine_of_ones_own(tmp_path: Path) -> None:
    text = (machines.FOLDER / "summit.toml").read_text()
    mine = tmp_path / "mine.toml"
    mine.write_text(text.replace("ranks_per_node = 6", "ranks_per_node = 3"))
    done = simulate("--machine", mine, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["machine"] == "mine"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[parameters.watts]", "[parameters.what]", "unknown parameter 'what'"),
        ("max_ranks = 27648", "", "missing 'max_ranks'"),
        ("value = 14e-6", "value = 1.0", "does not hold 1"),
        ("value = 25e9", "value = 0", "network_bandwidth: 0 is too small"),
        ('"ring", "tree"', '"ring", "star"', "star"),
        ("ranks_per_node = 6", "ranks_per_node = 0", "1 or more"),
        ("blocking = false", "blocking = ", "mine.toml"),
    ],
)
def test_a_damaged_machine_says_what_is_wrong(
    old: str, new: str, says: str, tmp_path: Path
) -> None:
    text = (machines.FOLDER / "summit.toml").read_text()
    assert old in text
    mine = tmp_path / "mine.toml"
    mine.write_text(text.replace(old, new, 1))
    with pytest.raises(InvalidOptionError, match=says) as caught:
        machines.load(str(mine))
    assert "--machine" in str(caught.value)


@pytest.mark.parametrize("name", machines.names())
def test_every_number_has_a_source(name: str) -> None:
    machine = machines.load(name)
    assert list(machine.parameters) == list(machines.PARAMETERS)
    for key, parameter in machine.parameters.items():
        assert len(parameter.source) > 6 or parameter.source == "assumed", key
        # A value that nobody measured or published has a range.
        if parameter.source.startswith("assumed") and not key.endswith("_flops"):
            assert parameter.low < parameter.high, key
    for workload in workloads.names():
        found = experiment.simulate(machine, workloads.load(workload), 2, steps=1)
        assert all(0 < row.efficiency <= 1.01 for row in found)


def test_options_name_what_there_is() -> None:
    shown = " ".join(CliRunner().invoke(main, ["simulate", "--help"]).output.split())
    for name in (*machines.names(), *workloads.names()):
        assert name in shown


# --- the page


def test_the_page_shows_its_numbers() -> None:
    found = json.loads((ROOT / "docs" / "scaling.json").read_text())
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert tables.fill(page, found) == page, "say make scaling"
    for line in page.splitlines():
        if line.startswith("!["):
            image = line[line.index("](") + 2 : -1]
            assert (ROOT / "docs" / image).exists()


def test_the_pages_parameters_are_those_of_the_model() -> None:
    found = json.loads((ROOT / "docs" / "scaling.json").read_text())
    now = report.parameters(machines.load("summit"), workloads.load("stemdl"))
    assert found["efficiency"]["stemdl"]["parameters"] == tables.rounded(now), (
        "say make scaling"
    )
