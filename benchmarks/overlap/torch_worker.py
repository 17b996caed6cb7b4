"""The overlap benchmark's job for PyTorch's DDP over gloo; needs nothing but torch.

benchmarks.overlap.torch_worker OUT REPEATS, with BENCH_RANK, BENCH_RANKS and
BENCH_COORDINATOR set. The network is worker.py's residual one.
"""

import json
import os
import sys
import time
from pathlib import Path

# pyright: reportMissingImports=false
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import relu
from torch.nn.parallel import DistributedDataParallel

WARM_UP = 2
# More images than worker.py's, so that both compute for about as long.
IMAGES, SIDE, WIDTHS, BLOCKS = 20, 32, (32, 64, 128), 8


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, stride, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        changed = inputs != width
        self.around = nn.Conv2d(inputs, width, 1, stride) if changed else nn.Identity()

    def forward(self, x):
        return relu(self.around(x) + 0.1 * self.second(relu(self.first(x))))


class ResNet(nn.Module):
    """A residual network of 24 blocks; no normalisation, so only gradients travel."""

    def __init__(self):
        super().__init__()
        layers, inputs = [nn.Conv2d(3, WIDTHS[0], 3, padding=1)], WIDTHS[0]
        for width in WIDTHS:
            for block in range(BLOCKS):
                stride = 2 if block == 0 and width > WIDTHS[0] else 1
                layers.append(Block(inputs, width, stride))
                inputs = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, 10)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


def main(out, repeats):
    rank, size = int(os.environ["BENCH_RANK"]), int(os.environ["BENCH_RANKS"])
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{os.environ['BENCH_COORDINATOR']}",
        rank=rank,
        world_size=size,
    )
    images = torch.randn(IMAGES, 3, SIDE, SIDE)

    def wrapped(**options):
        return DistributedDataParallel(
            ResNet(), gradient_as_bucket_view=True, static_graph=True, **options
        )

    usual, small = wrapped(), wrapped(bucket_cap_mb=1)
    flat = torch.ones(sum(leaf.numel() for leaf in usual.parameters()))

    def step(model):
        model.zero_grad(set_to_none=False)
        model(images).square().mean().backward()

    local = ResNet()
    ways = {
        "compute": lambda: step(local),
        "communication": lambda: dist.all_reduce(flat),
        "DDP, buckets of 25 MiB (its default)": lambda: step(usual),
        "DDP, buckets of 1 MiB": lambda: step(small),
    }
    samples = {name: [] for name in ways}
    for repeat in range(WARM_UP + int(repeats)):
        for name, way in ways.items():
            dist.barrier()
            start = time.perf_counter()
            way()
            seconds = torch.tensor([time.perf_counter() - start])
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if repeat >= WARM_UP:
                samples[name].append(1e3 * seconds.item())
    if rank == 0:
        Path(out).write_text(json.dumps({"samples": samples, "bytes": 4 * len(flat)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
