"""`jaxcomm plan`: print the schedule of a tree without running anything."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from jaxcomm.collectives import reductions
from jaxcomm.errors import InvalidOptionError
from jaxcomm.planning import costs as costmodel
from jaxcomm.planning import planner
from jaxcomm.planning.costs import CostModel
from jaxcomm.planning.schedule import Schedule


def load_target(target: str) -> Any:
    """Call "module:function" and return its tree.

    Raises:
      InvalidOptionError: there is no such module or function, or it failed.
    """
    name, _, function = target.partition(":")
    if not name or not function:
        raise InvalidOptionError(
            f"{target!r}; give MODULE:FUNCTION, a function of no arguments that "
            "returns a tree of arrays or ShapeDtypeStructs, or --shapes FILE"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(name), function)()
    except Exception as error:  # whatever the user's module raises
        raise InvalidOptionError(
            f"{target}: {type(error).__name__}: {error}; it is imported from the "
            "current folder and called without arguments"
        ) from error


def load_shapes(path: Path) -> Any:
    """Read a tree of {"shape": [...], "dtype": "float32"} from JSON.

    Dictionaries and lists nest; a dtype that is left out is float32.

    Raises:
      InvalidOptionError: the file cannot be read, or a leaf cannot be understood.
    """
    try:
        return _tree(json.loads(path.read_text()), "")
    except (OSError, ValueError) as error:
        raise InvalidOptionError(f"--shapes {path}: {error}") from error


def _tree(node: Any, path: str) -> Any:
    import jax
    import jax.numpy as jnp

    if isinstance(node, dict) and "shape" in node and set(node) <= {"shape", "dtype"}:
        shape, dtype = node["shape"], node.get("dtype", "float32")
        good = isinstance(shape, list) and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape
        )
        if not good:
            raise InvalidOptionError(
                f"leaf {path or '(root)'}: shape {shape!r} is not a list of sizes"
            )
        try:
            return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        except TypeError as error:
            raise InvalidOptionError(
                f"leaf {path or '(root)'}: dtype {dtype!r}: {error}"
            ) from error
    if isinstance(node, dict):
        return {key: _tree(value, f"{path}[{key!r}]") for key, value in node.items()}
    if isinstance(node, list):
        return [_tree(value, f"{path}[{k}]") for k, value in enumerate(node)]
    raise InvalidOptionError(
        f"leaf {path or '(root)'} is {node!r}; write "
        '{"shape": [3, 3], "dtype": "float32"}'
    )


def make(
    tree: Any, *, ranks: int, profile: Path | None, **options: Any
) -> tuple[Schedule, CostModel]:
    """Plan a tree with a profile's cost model, or the default one."""
    costs = costmodel.DEFAULT
    if profile is not None:
        try:
            costs = CostModel.from_json(profile.read_text())
        except OSError as error:
            raise InvalidOptionError(f"--profile {profile}: {error}") from error
    planner.check_options(
        groups=options["groups"],
        bucket_bytes=options["bucket_bytes"],
        op=options["op"],
    )
    paths, leaves, _ = reductions.flatten(tree, abstract=True)
    specs = reductions.leaf_specs(paths, leaves)
    for spec in specs:
        reductions.world().backend.check(options["op"], spec.dtype, spec.path)
    return planner.make_schedule(specs, size=ranks, costs=costs, **options), costs


def as_json(schedule: Schedule, costs: CostModel) -> str:
    """Return the schedule and what it is predicted to cost."""
    return json.dumps(
        {
            "fingerprint": schedule.fingerprint,
            "nbytes": schedule.nbytes,
            "wire_nbytes": schedule.wire_nbytes,
            "costs": costmodel.summary(costs),
            "buckets": [
                {
                    "op": bucket.op,
                    "dtype": bucket.dtype,
                    "wire": bucket.wire or bucket.dtype,
                    "nbytes": schedule.bucket_nbytes(bucket),
                    "algorithm": bucket.algorithm,
                    "leaves": [schedule.leaves[i].path for i in bucket.leaves],
                    "packed": len(schedule.packed(bucket)),
                    "predicted_us": 1e6 * schedule.bucket_seconds(bucket, costs),
                }
                for bucket in schedule.buckets
            ],
            "schedule": json.loads(schedule.to_json()),
        },
        indent=1,
    )


def draw(schedule: Schedule, costs: CostModel, path: Path) -> None:
    """Plot bytes and predicted time of every bucket, in order."""
    from jaxcomm.plots import pyplot

    plt = pyplot()
    buckets = schedule.buckets
    rows = range(len(buckets))
    height = max(2.5, 1.2 + 0.3 * len(buckets))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, height), sharey=True, layout="constrained"
    )
    packed = [
        sum(schedule.leaves[i].nbytes for i in schedule.packed(b)) / 1e6
        for b in buckets
    ]
    in_place = [
        schedule.bucket_nbytes(b) / 1e6 - p
        for b, p in zip(buckets, packed, strict=True)
    ]
    left.barh(rows, in_place, label="in place")
    left.barh(rows, packed, left=in_place, label="packed")
    left.set_yticks(
        rows, [f"{k}: {len(b.leaves)} leaves" for k, b in enumerate(buckets)]
    )
    left.invert_yaxis()
    left.set(xlabel="MB", title="bytes")
    left.legend()
    right.barh(
        rows, [1e3 * schedule.bucket_seconds(b, costs) for b in buckets], color="0.6"
    )
    right.set(xlabel="ms", title=f"predicted time ({costs.source})")
    figure.suptitle(f"schedule {schedule.fingerprint[:12]}, {schedule.size} ranks")
    figure.savefig(path, dpi=120)
