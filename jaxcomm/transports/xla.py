"""Transport `xla`: XLA's own collectives, as a peer to compare with. Not built yet."""

from __future__ import annotations

from typing import NoReturn

import jax

from jaxcomm.errors import TransportUnavailableError


def connect() -> NoReturn:
    """Refuse, saying what to use instead.

    Raises:
      TransportUnavailableError: always, in this version.
    """
    raise TransportUnavailableError(
        "transport 'xla' is not built in this version of jaxcomm. XLA's collectives "
        f"need one program over all processes (jax.distributed; {jax.process_count()} "
        "here): use jax.shard_map with lax.pmean there, or transport='mpi'."
    )
