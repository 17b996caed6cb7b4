"""The folders of jaxcomm: what the page says of them, and who knows of JAX."""

from __future__ import annotations

import re
import subprocess
import sys

import draw_architecture  # pyright: ignore

from tests.jobs import ROOT

WITHOUT_JAX = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from jaxcomm.planning import planner
from jaxcomm.planning.schedule import LeafSpec
from jaxcomm.simulate import experiment

leaves = tuple(LeafSpec(f"['{k}']", (1000,), "bfloat16", k) for k in range(3))
schedule = planner.make_schedule(leaves, op="mean", size=4)
assert [bucket.leaves for bucket in schedule.buckets] == [(0, 1, 2)], schedule
assert not {"jax", "jaxlib"} & set(sys.modules)
"""


def test_the_picture_is_of_the_code() -> None:
    text = draw_architecture.PAGE.read_text()
    assert text == draw_architecture.page(text), "python docs/draw_architecture.py"


def test_the_page_names_every_folder() -> None:
    text = draw_architecture.PAGE.read_text()
    folders = {path.parent.name for path in (ROOT / "jaxcomm").glob("*/__init__.py")}
    assert folders == set(re.findall(r"^\| `(\w+)/`", text, re.MULTILINE))


def test_one_module_knows_the_versions_of_jax() -> None:
    inside = re.compile(r"\bjax\._src\b|\bjax\.interpreters\b|\bjax\.extend\b")
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "jaxcomm").rglob("*.py")
        if inside.search(path.read_text())
    }
    assert found == {"jaxcomm/compat.py"}


def test_one_module_reads_the_parameters_of_equations() -> None:
    """Others pass them on whole, as `**eqn.params` of jaxcomm's own primitives."""
    read = re.compile(r"(?<!\*\*)(?<!\*\*unit\.)\b(eqn|last)\.params\b")
    keys = re.compile(
        r"cond_jaxpr|body_jaxpr|call_jaxpr|num_consts|num_carry|_nconsts|ft_in|"
        r"axis_index_groups\"|all_gather_dimension|scatter_dimension|\"perm\"|"
        r"prevent_cse\"|\"(scan|while|cond|remat2?|pjit|axis_index)\""
    )
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "jaxcomm").rglob("*.py")
        if read.search(path.read_text()) or keys.search(path.read_text())
    }
    assert found == {"jaxcomm/compat.py"}


def test_transports_are_named_in_their_folder_alone() -> None:
    compared = re.compile(r"transport(?:\.name|_name)? (?:==|!=|in|not in) [\"({\[]")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "jaxcomm").rglob("*.py")
        if "transports" not in path.parts
        for line in path.read_text().splitlines()
        if compared.search(line)
    ]
    # What the user may say instead of a name.
    assert [line for line in found if '"auto"' not in line] == []


def test_planning_and_the_simulator_work_without_jax() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
