"""The benchmark's job for Horovod over MPI; needs torch and Horovod.

mpiexec -n 2 python -m benchmarks.reduction.horovod_worker OUT SHAPES.json REPEATS.
SHAPES.json holds [[sizes of a leaf], ...].
"""

import json
import sys
import time
from pathlib import Path

# pyright: reportMissingImports=false
import horovod.torch as hvd
import torch

# The first steps fill Horovod's response cache.
WARM_UP = 5


def main(out, shapes, repeats):
    torch.set_num_threads(1)
    hvd.init()
    shapes = json.loads(Path(shapes).read_text())
    leaves = [torch.ones(shape) for shape in shapes]

    def per_leaf():
        handles = [
            hvd.allreduce_async_(leaf, op=hvd.Average, name=f"leaf{k}")
            for k, leaf in enumerate(leaves)
        ]
        for handle in handles:
            hvd.synchronize(handle)

    def grouped():
        hvd.grouped_allreduce_(leaves, op=hvd.Average, name="all")

    ways = {"Horovod, per leaf async": per_leaf, "Horovod, grouped": grouped}
    samples = {name: [] for name in ways}
    for repeat in range(WARM_UP + int(repeats)):
        for name, way in ways.items():
            hvd.barrier()
            start = time.perf_counter()
            way()
            if repeat >= WARM_UP:
                samples[name].append(1e3 * (time.perf_counter() - start))
    Path(out).with_suffix(f".{hvd.rank()}").write_text(json.dumps(samples))
    hvd.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
