"""Train over a transport that is named, instead of the one jaxcomm would take.

jaxcomm run -n 2 examples/stemdl/over_transport.py mpi4jax [options of train.py]
"""

from __future__ import annotations

import sys

import jaxcomm
import train

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("name a transport first: over_transport.py mpi4jax --steps 60")
    # The first call decides; train.py's own then returns the same communicator.
    jaxcomm.init(sys.argv.pop(1))
    train.main()
