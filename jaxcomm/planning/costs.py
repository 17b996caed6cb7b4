"""What a bucket costs: the model that the planner asks.

    time of a bucket = call + sum over messages of t(bytes) + packed bytes / copy

where t is the time of one MPI all-reduce, a curve through measured points: latency at
its left end, bandwidth at its right. `jaxcomm tune` measures curve and copy speed for
the job at hand and writes a profile; `find_profile` reads it in later jobs.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcomm.errors import InvalidOptionError

FORMAT = 1
PROFILE_VARIABLE = "JAXCOMM_PROFILE"
_LATENCY_SHARE = 0.02
# Of a message's latency, what keeps its sender from sending the next.
_OVERHEAD_SHARE = 1 / 8

# How buckets move between hosts whose ranks share memory (native/src/mpi/exchange.h).
ALGORITHMS = ("doubling", "pairwise")


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Time of a bucket.

    Attributes:
      call: seconds of a custom call before its first message.
      curve: (bytes, seconds) of one in-place all-reduce, by rising bytes.
      copy_bandwidth: bytes per second of packing and unpacking, both counted.
      segment_bytes: large leaves are reduced in messages of this size.
      source: "default", "default between hosts", "default over NCCL", or the key of the
        profile it was read from.
    """

    call: float
    curve: tuple[tuple[int, float], ...]
    copy_bandwidth: float
    segment_bytes: int
    source: str = "default"

    def message_seconds(self, nbytes: int) -> float:
        """Time of one message: linear between points, the last slope beyond them."""
        sizes = [size for size, _ in self.curve]
        k = min(max(bisect.bisect_left(sizes, nbytes), 1), len(sizes) - 1)
        (x0, y0), (x1, y1) = self.curve[k - 1], self.curve[k]
        return max(y0 + (y1 - y0) * (nbytes - x0) / (x1 - x0), self.curve[0][1])

    def in_place_seconds(self, nbytes: int) -> float:
        """Time of one leaf that is reduced where it lies."""
        full, rest = divmod(nbytes, self.segment_bytes)
        seconds = full * self.message_seconds(self.segment_bytes)
        return seconds + (self.message_seconds(rest) if rest else 0.0)

    def bucket_seconds(self, in_place: Sequence[int], packed: int) -> float:
        """Time of a bucket: sizes of its leaves in place, and all packed bytes."""
        seconds = self.call + sum(map(self.in_place_seconds, in_place))
        if packed:
            seconds += self.in_place_seconds(packed) + packed / self.copy_bandwidth
        return seconds

    def between_hosts_seconds(self, algorithm: str, nbytes: int, hosts: int) -> float:
        """Time that a bucket takes between hosts.

        The curve's first point is taken for the latency of a message, and its bandwidth
        for that of an all-reduce that sends every byte 2 (hosts - 1) / hosts times.

        Args:
          algorithm: of `ALGORITHMS`.
          nbytes: what travels of it.
          hosts: how many there are, 2 or more.
        """
        latency = self.curve[0][1]
        share = 2 * (hosts - 1) / hosts
        if algorithm == "doubling":
            steps = hosts.bit_length() - 1
            if hosts > 1 << steps:  # the others give what they have to one of these
                steps += 2
            messages, sent = steps, steps * nbytes
        else:
            steps, messages, sent = 2, 2 * (hosts - 1), share * nbytes
        wire = share * self.bandwidth
        return latency * (steps + _OVERHEAD_SHARE * messages) + sent / wire

    def algorithm(self, nbytes: int, hosts: int) -> str:
        """Return the faster of `ALGORITHMS` for a bucket; as many bits come out."""
        return min(
            ALGORITHMS, key=lambda name: self.between_hosts_seconds(name, nbytes, hosts)
        )

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a large leaf in place."""
        return self.segment_bytes / self.message_seconds(self.segment_bytes)

    @functools.cached_property
    def pack_bytes(self) -> int:
        """Largest leaf for which two copies cost less than a message of its own."""

        def gain(nbytes: int) -> float:
            together = nbytes / self.bandwidth + nbytes / self.copy_bandwidth
            return self.message_seconds(nbytes) - together

        # The gain starts at a whole latency; look for the size where it is used up.
        size = 1
        while 2 * size <= self.segment_bytes and gain(2 * size) > 0:
            size *= 2
        low, high = size, 2 * size
        while high - low > 256:
            middle = (low + high) // 2
            low, high = (middle, high) if gain(middle) > 0 else (low, middle)
        return low

    @functools.cached_property
    def bucket_bytes(self) -> int:
        """Smallest bucket in which latency takes at most 2% of the time."""
        return int(self.latency_bytes * (1 - _LATENCY_SHARE) / _LATENCY_SHARE)

    def bucket_bytes_of(self, total: int) -> int:
        """Size of the buckets that `total` bytes are divided into.

        n buckets cost n latencies, and what cannot hide behind the computation is the
        last one's transfer, a share 1/n of all: the sum is least where the two are
        equal. Less than two are one; for large totals a latency share of 2% is small
        enough.
        """
        if total < 4 * self.latency_bytes:
            return max(total, 1)
        return min(self.bucket_bytes, math.isqrt(total * self.latency_bytes))

    @functools.cached_property
    def latency_bytes(self) -> int:
        """Bytes that could travel in a bucket's latency."""
        return max(int((self.call + self.curve[0][1]) * self.bandwidth), 1)

    def to_json(self) -> str:
        """Return JSON with all digits."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Read what `to_json` wrote.

        Raises:
          InvalidOptionError: the text is not a profile of this format, or its numbers
            are not usable.
        """
        try:
            tree = json.loads(text)
            if tree["format"] != FORMAT:
                raise ValueError(f"format {tree['format']}, expected {FORMAT}")
            model = cls(
                float(tree["call"]),
                tuple((int(b), float(s)) for b, s in tree["curve"]),
                float(tree["copy_bandwidth"]),
                int(tree["segment_bytes"]),
                str(tree["source"]),
            )
            numbers = [model.call, model.copy_bandwidth, *(s for _, s in model.curve)]
            sizes = [size for size, _ in model.curve]
            if (
                len(sizes) < 2
                or sizes != sorted(set(sizes))
                or not all(math.isfinite(x) and x > 0 for x in numbers)
                or model.segment_bytes < 4096
            ):
                raise ValueError("its numbers are not those of a measured curve")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidOptionError(
                f"not a jaxcomm profile: {error}; measure again with `jaxcomm tune`"
            ) from error
        return model


# Two ranks of one host (2 cores of an AMD EPYC), through the memory they share: rounded
# from what `jaxcomm tune` found. `copy_bandwidth` and `segment_bytes` are those of MPI
# calls between hosts; within one there is nothing to choose.
DEFAULT = CostModel(
    call=3e-6,
    curve=(
        (8, 2.9e-6),
        (2048, 3.3e-6),
        (8192, 4.5e-6),
        (32768, 9e-6),
        (131072, 22e-6),
        (524288, 54e-6),
        (2097152, 190e-6),
    ),
    copy_bandwidth=24e9,
    segment_bytes=1 << 20,
)

# Ranks on several hosts: a round guess at 10 Gbit/s Ethernet over TCP, for want of
# better; `jaxcomm tune` replaces it. Messages are short: many are on their way at once
# (mpi/exchange.h), and a slow wire carries short ones better (docs/performance.md).
BETWEEN_HOSTS = CostModel(
    call=3e-6,
    curve=((8, 50e-6), (4096, 54e-6), (8 << 20, 50e-6 + (8 << 20) / 1.1e9)),
    copy_bandwidth=10e9,
    segment_bytes=1 << 17,
    source="default between hosts",
)

# Two ranks that share one H200 under NVIDIA's MPS (benchmarks/results/gpu.json): what a
# bucket more costs, what a leaf more in NCCL's group of a bucket, and how fast 102 MB
# are reduced. Links between GPUs are not in it.
OVER_NCCL = CostModel(
    call=180e-6,
    curve=((8, 2e-6), (1 << 20, 2e-6 + (1 << 20) / 160e9), (1 << 26, 420e-6)),
    copy_bandwidth=1000e9,
    segment_bytes=1 << 26,
    source="default over NCCL",
)


def topology(transport: str, library: str, local_sizes: Sequence[int]) -> str:
    """Name what a profile holds for: the same on every rank, without host names.

    Args:
      transport: "mpi" or "mpi4jax".
      library: the MPI library's own first line of version.
      local_sizes: for every rank, the number of ranks on its host.
    """
    size = len(local_sizes)
    per_host = max(local_sizes, default=1)
    digest = hashlib.sha256(
        json.dumps([transport, library, processor(), sorted(local_sizes)]).encode()
    )
    return f"{transport}-{size}x{per_host}-{digest.hexdigest()[:12]}"


@functools.cache
def processor() -> str:
    """Name this host's processor and how many cores may be used."""
    text = ""
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        names = [
            x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")
        ]
        text = names[0] if names else ""
    return f"{text}, {os.cpu_count()} cores"


def profile_path(key: str) -> Path | None:
    """Return the profile's file; None where JAXCOMM_PROFILE=off.

    JAXCOMM_PROFILE names another file; else profiles lie in the user's cache.
    """
    chosen = os.environ.get(PROFILE_VARIABLE)
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("jaxcomm") / "profiles" / f"{key}.json"


def find_profile(key: str, default: CostModel = DEFAULT) -> CostModel:
    """Return the profile of a topology, or `default` where there is none.

    Raises:
      InvalidOptionError: the file is damaged, or JAXCOMM_PROFILE names none.
    """
    path = profile_path(key)
    if path is None:
        return default
    try:
        text = path.read_text()
    except OSError as error:
        if os.environ.get(PROFILE_VARIABLE):
            raise InvalidOptionError(f"{PROFILE_VARIABLE}={path}: {error}") from error
        return default
    try:
        return CostModel.from_json(text)
    except InvalidOptionError as error:
        raise InvalidOptionError(f"{path}: {error}, or delete the file") from error


def save_profile(model: CostModel, path: Path) -> None:
    """Write a profile, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(model.to_json() + "\n")
    os.replace(file.name, path)


def summary(model: CostModel) -> dict[str, Any]:
    """What the planner takes from a model."""
    return {
        "source": model.source,
        "latency_us": 1e6 * (model.call + model.curve[0][1]),
        "bandwidth_gb_s": model.bandwidth / 1e9,
        "copy_gb_s": model.copy_bandwidth / 1e9,
        "segment_bytes": model.segment_bytes,
        "pack_bytes": model.pack_bytes,
        "bucket_bytes": model.bucket_bytes,
    }
