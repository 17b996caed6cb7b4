"""One rank of `jaxcomm tune` where the launcher cannot start it: between two hosts.

benchmarks.overlap.tune_worker PROFILE
"""

import sys
from pathlib import Path

import jaxcomm
from jaxcomm.launch import measure
from jaxcomm.planning import costs

if __name__ == "__main__":
    comm = jaxcomm.init()
    found = measure.measure(comm)
    if comm.rank == 0:
        costs.save_profile(found.model, Path(sys.argv[1]))
