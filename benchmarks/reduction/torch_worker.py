"""The benchmark's job for torch.distributed over gloo; needs nothing but torch.

python -m benchmarks.reduction.torch_worker OUT SHAPES.json REPEATS, with BENCH_RANK,
BENCH_RANKS and BENCH_COORDINATOR set. SHAPES.json holds [[sizes of a leaf], ...].
"""

import json
import os
import sys
import time
from pathlib import Path

# pyright: reportMissingImports=false
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

WARM_UP = 2


class Model(torch.nn.Module):
    """Parameters of given shapes, whose gradients are all 1.5."""

    def __init__(self, shapes):
        super().__init__()
        self.leaves = torch.nn.ParameterList(torch.ones(shape) for shape in shapes)

    def forward(self):
        return torch.stack([(1.5 * leaf).sum() for leaf in self.leaves]).sum()


def main(out, shapes, repeats):
    rank, size = int(os.environ["BENCH_RANK"]), int(os.environ["BENCH_RANKS"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{os.environ['BENCH_COORDINATOR']}",
        rank=rank,
        world_size=size,
    )
    shapes = json.loads(Path(shapes).read_text())
    # Static buckets and no copy out of them: DDP at its best.
    model = DistributedDataParallel(
        Model(shapes), gradient_as_bucket_view=True, static_graph=True
    )
    flat = torch.ones(sum(leaf.numel() for leaf in model.parameters()))

    def with_reduction():
        model.zero_grad(set_to_none=False)
        model().backward()

    def without():
        with model.no_sync():
            model.zero_grad(set_to_none=False)
            model().backward()

    def all_reduce_flat():
        dist.all_reduce(flat)
        flat.div_(size)

    ways = {
        "torch DDP, gloo": with_reduction,
        "no reduction": without,
        "torch flat, gloo": all_reduce_flat,
    }
    samples = {name: [] for name in ways}
    for repeat in range(WARM_UP + int(repeats)):
        for name, way in ways.items():
            dist.barrier()
            start = time.perf_counter()
            way()
            if repeat >= WARM_UP:
                samples[name].append(1e3 * (time.perf_counter() - start))
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(samples))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
