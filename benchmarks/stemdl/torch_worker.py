"""The STEMDL benchmark's job for PyTorch's DDP over gloo; needs nothing but torch.

benchmarks.stemdl.torch_worker OUT NETWORK.json REPEATS, with BENCH_RANK, BENCH_RANKS
and BENCH_COORDINATOR set. NETWORK.json holds growth, kernel, up_kernel and layers of
the example's network, channels and pixels of its input, batch and calls.
"""

import json
import os
import sys
from pathlib import Path

RANK = int(os.environ["BENCH_RANK"])
# As `jaxcomm run` pins its ranks: before torch counts the cores.
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[RANK]})

# pyright: reportMissingImports=false
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import relu  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from benchmarks.common import taking_turns  # noqa: E402

DDP = "torch DDP, gloo"


class DenseBlock(nn.Module):
    """Layers that each see all features before them; returns (all, new) features."""

    def __init__(self, channels, layers, growth, kernel):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(
                channels + k * growth, growth, kernel, padding=kernel // 2, bias=False
            )
            for k in range(layers)
        )

    def forward(self, x):
        new = []
        for layer in self.layers:
            new.append(layer(relu(x)))
            x = torch.cat([x, new[-1]], 1)
        return x, torch.cat(new, 1)


class StemNet(nn.Module):
    """stemdl/model/network.py's, in the layout with probes as channels."""

    def __init__(self, channels, growth, kernel, up_kernel, layers, **_):
        super().__init__()
        half, width = len(layers) // 2, growth
        self.first = nn.Conv2d(channels, growth, kernel, padding=kernel // 2)
        self.down, self.transitions, skips = nn.ModuleList(), nn.ModuleList(), []
        for count in layers[:half]:
            self.down.append(DenseBlock(width, count, growth, kernel))
            width += count * growth
            skips.append(width)
            # Flax's momentum is of the old statistics, torch's of the new ones.
            norm = nn.BatchNorm2d(width, momentum=0.1)
            nn.init.constant_(norm.weight, 0.1)
            mix = nn.Conv2d(width, width, 1, bias=False)
            parts = (norm, nn.ReLU(), mix, nn.MaxPool2d(2))
            self.transitions.append(nn.Sequential(*parts))
        self.bottleneck = DenseBlock(width, layers[half], growth, kernel)
        new = layers[half] * growth
        self.raises, self.up = nn.ModuleList(), nn.ModuleList()
        for count in layers[half + 1 :]:
            # Twice the size, whatever the kernel.
            padding = (up_kernel - 1) // 2
            more = 2 - up_kernel + 2 * padding
            self.raises.append(
                nn.ConvTranspose2d(new, new, up_kernel, 2, padding, more, bias=False)
            )
            width = new + skips.pop()
            self.up.append(DenseBlock(width, count, growth, kernel))
            width, new = width + count * growth, count * growth
        self.last = nn.Conv2d(width, 1, 1, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x):
        x, skips = relu(self.first(x)), []
        for block, transition in zip(self.down, self.transitions, strict=True):
            x, _ = block(x)
            skips.append(x)
            x = transition(x)
        x, new = self.bottleneck(x)
        for raised, block in zip(self.raises, self.up, strict=True):
            x, new = block(torch.cat([raised(new), skips.pop()], 1))
        return self.last(x)[:, 0]


def main(out, network, repeats):
    network = json.loads(Path(network).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(RANK)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{os.environ['BENCH_COORDINATOR']}",
        rank=RANK,
        world_size=int(os.environ["BENCH_RANKS"]),
    )
    shape = (network["batch"], network["channels"], network["pixels"])
    x = torch.randn(*shape, network["pixels"])
    y = torch.randn(network["batch"], network["pixels"], network["pixels"])
    plain = StemNet(**network)
    # DDP at its best: static buckets, no copy out of them, and batch statistics that
    # each rank keeps to itself, where jaxcomm's and pmap's steps average them.
    replicated = DistributedDataParallel(
        StemNet(**network),
        gradient_as_bucket_view=True,
        static_graph=True,
        broadcast_buffers=False,
    )

    def block(model):
        adam = torch.optim.Adam(model.parameters(), lr=3e-3)

        def run():
            for _ in range(network["calls"]):
                adam.zero_grad(set_to_none=False)
                loss = (model(x) - y).square().mean()
                loss.backward()
                adam.step()

        return run

    blocks = {DDP: block(replicated), taking_turns.TOGETHER: block(plain)}
    out = Path(out)
    samples = taking_turns.seconds_of(
        blocks, RANK, int(repeats), out.parent, dist.barrier
    )
    parameters = sum(leaf.numel() for leaf in plain.parameters())
    found = {"seconds": samples, "parameters": parameters}
    out.with_suffix(f".{RANK}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
