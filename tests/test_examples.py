"""The examples of docstrings and of two pages say what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jaxcomm.data
from tests.jobs import ROOT, Launch
from tests.programs import doctest_ranks

RANKS = ROOT / "tests" / "programs" / "doctest_ranks.py"
PAGES = [ROOT / "docs" / "sharp-bits.md", ROOT / "docs" / "porting.md"]


def without_example() -> list[str]:
    public = doctest_ranks.public()
    return [k for k, value in public.items() if not doctest_ranks.of_object(k, value)]


def test_everything_public_has_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_example() == []

    def plain() -> None:
        """Say nothing of its use."""

    plain.__module__ = "jaxcomm.data"
    monkeypatch.setattr(jaxcomm.data, "plain", plain, raising=False)
    assert without_example() == ["data.plain"]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_docstrings(launch: Launch, ranks: int) -> None:
    done = launch(ranks, [RANKS], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    least = len(doctest_ranks.public())
    counts = [int(n) for n in re.findall(r"ran (\d+) examples", done.stdout)]
    assert len(counts) == ranks and min(counts) >= least, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages(launch: Launch, page: Path) -> None:
    done = launch(2, [RANKS, page], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    blocks = len(doctest_ranks.blocks(page))
    assert done.stdout.count(f"ran {blocks} examples") == 2
    # None was missed for how its fences are written.
    assert page.read_text().count("```") == 2 * blocks


WRONG_ON_RANK_1 = {
    "module.py": '''
def double(x):
    """
    >>> jaxcomm.all_reduce(jnp.ones(2))
    Array([1., 1.], dtype=float32)
    >>> double(jaxcomm.rank())
    0
    >>> jaxcomm.barrier()
    """
    return 2 * x
''',
    "page.md": """
```python
import jaxcomm
```

Then

```python
jaxcomm.world().barrier()
assert jaxcomm.rank() == 0
jaxcomm.world().barrier()
```
""",
}


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("module.py", "rank 1: the example of module.double:"),
        ("page.md", 'page.md", line 10, in <module>'),
    ],
)
def test_an_example_that_is_wrong_on_one_rank(
    launch: Launch, tmp_path: Path, file: str, named: str
) -> None:
    (tmp_path / file).write_text(WRONG_ON_RANK_1[file])
    done = launch(2, [RANKS, tmp_path / file])
    assert done.returncode not in (0, 70, 124), done.stderr
    assert "rank 1 of 2 failed" in done.stderr
    assert named in done.stderr
