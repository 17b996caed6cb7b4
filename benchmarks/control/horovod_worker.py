"""Horovod's own control plane; needs torch and Horovod.

mpiexec -n N python -m benchmarks.control.horovod_worker OUT REPEATS. Steps of tensors
of one element each, which are all negotiation and no data.
HOROVOD_CACHE_CAPACITY=0 in the environment switches the response cache off.
"""

import json
import sys
import time
from pathlib import Path

# pyright: reportMissingImports=false
import horovod.torch as hvd
import torch

WARM_UP = 20


def main(out, repeats):
    torch.set_num_threads(1)
    hvd.init()
    samples = {}
    for tensors in (33, 161):
        leaves = [torch.ones(1) for _ in range(tensors)]

        def each(leaves=leaves):
            handles = [
                hvd.allreduce_async_(x, name=f"leaf{k}") for k, x in enumerate(leaves)
            ]
            for handle in handles:
                hvd.synchronize(handle)

        def grouped(leaves=leaves):
            hvd.grouped_allreduce_(leaves, name="all")

        for name, way in (("each", each), ("grouped", grouped)):
            found = []
            for repeat in range(WARM_UP + int(repeats)):
                start = time.perf_counter()
                way()
                if repeat >= WARM_UP:
                    found.append(1e6 * (time.perf_counter() - start))
            samples[f"Horovod {name}, {tensors} tensors (us)"] = found
    if hvd.rank() == 0:
        Path(out).write_text(json.dumps(samples))
    hvd.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
