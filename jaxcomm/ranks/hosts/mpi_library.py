"""Which MPI this process uses, and by which of its components messages travel.

Asked by the reports of a stall.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator

from jaxcomm import native

# Of Open MPI: its frameworks that move messages, the components they may have, and a
# variable that a component has for as long as it is open. Open MPI closes what it does
# not select, and then the variable is gone.
_FRAMEWORKS = {
    "pml": ("priority", ("ob1", "ucx", "cm")),
    "btl": (
        "eager_limit",
        ("self", "sm", "vader", "smcuda", "tcp", "uct", "ofi", "openib", "ugni"),
    ),
    "mtl": ("priority", ("ofi", "psm2", "portals4")),
    "smsc": ("priority", ("cma", "knem", "xpmem", "accelerator")),
}
# mpiexec sets more of Open MPI's, which say nothing of how messages travel.
_SETTINGS = (
    *(f"OMPI_MCA_{framework}" for framework in (*_FRAMEWORKS, "bml", "coll")),
    "MPIR_CVAR_",
    "MPICH_",
    "UCX_",
    "FI_",
)


@functools.cache
def describe() -> str:
    """Return the library's version, its components in use, and settings of them.

    Like "Open MPI v5.0.11; pml ob1; btl self, sm; smsc cma; OMPI_MCA_btl=self,sm".
    """
    from mpi4py import MPI

    lines = MPI.Get_library_version().strip("\0\n ").splitlines()
    # MPICH's other lines say how it was configured; its device is what moves messages.
    lines = [lines[0].split(", package:")[0], *(n for n in lines[1:] if "Device:" in n)]
    parts = [" ".join(line.split()) for line in lines]
    if "Open MPI" in parts[0]:
        parts += _components(MPI.Query_thread())
    return "; ".join([*parts, *_settings()])


def _settings() -> Iterator[str]:
    for name in sorted(os.environ):
        if name.startswith(_SETTINGS):
            yield f"{name}={os.environ[name]}"


def _components(level: int) -> list[str]:
    """Return the components of Open MPI that are in use, a text for each framework.

    Args:
      level: MPI's thread level. Open MPI 5.0 takes that of its tools interface for its
        own from then on, and where it is MPI_THREAD_SINGLE locks nothing.
    """
    libraries = [ctypes.CDLL(path) for path in native.loaded_mpi_libraries()]
    library = next((x for x in libraries if hasattr(x, "MPI_T_init_thread")), None)
    provided = ctypes.byref(ctypes.c_int())
    if library is None or library.MPI_T_init_thread(level, provided):
        return []

    def exists(variable: str) -> bool:
        index = ctypes.c_int()
        name = variable.encode()
        return library.MPI_T_cvar_get_index(name, ctypes.byref(index)) == 0

    found: dict[str, list[str]] = {}
    for framework, (variable, names) in _FRAMEWORKS.items():
        used = [n for n in names if exists(f"{framework}_{n}_{variable}")]
        if framework == "btl" and "sm" in used and "vader" in used:
            used.remove("vader")  # an old name of sm
        if framework != "mtl" or "cm" in found["pml"]:  # only cm uses those
            found[framework] = used
    library.MPI_T_finalize()
    return [f"{name} {', '.join(used) or 'none'}" for name, used in found.items()]
