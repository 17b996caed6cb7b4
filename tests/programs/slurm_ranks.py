"""A training that goes on from its checkpoint, and ends on request.

slurm_ranks.py FOLDER STEPS [PAUSE]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

import jaxcomm
from jaxcomm import checkpoint

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.05
comm = jaxcomm.init()
folder.mkdir(exist_ok=True)
with checkpoint.Stop(every=1) as stop:
    found = checkpoint.restore(folder / "checkpoints", (0, np.zeros(1000, np.float32)))
    step, state = found.state if found else (0, np.zeros(1000, np.float32))
    begun = step
    while step < steps:
        state = state + jaxcomm.all_reduce(np.float32(comm.rank + 1), op="sum")
        step += 1
        if step == begun + 3 and comm.rank == 0:
            (folder / f"runs{os.environ.get('SLURM_RESTART_COUNT', '')}").touch()
        if stop.requested(step) or step == steps:
            checkpoint.save(folder / "checkpoints", step, (step, np.asarray(state)))
            break
        time.sleep(pause)
comm.barrier()
if comm.rank == 0:
    if step == steps:
        (folder / "finished").touch()
    sums = {float(x) for x in state}
    print(f"steps {begun} to {step} of {steps} on {comm.size}, sums {sums}", flush=True)
