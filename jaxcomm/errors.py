"""What jaxcomm raises. Every message names the leaf, rank or option and the remedy.

In a user's own `jit`, an error of a call that runs arrives as
`jax.errors.JaxRuntimeError`, whose text begins with the name of one of these.

Example:
  >>> try:
  ...     jaxcomm.all_reduce({"w": "text"})
  ... except jaxcomm.errors.InvalidTreeError as error:
  ...     print(str(error).partition(".")[0])
  leaf ['w'] is not an array but str: 'text'
"""


class JaxcommError(Exception):
    """Base of all errors of this package."""


class ScheduleMismatchError(JaxcommError):
    """The ranks of a communicator hold different schedules; nothing was sent."""


class ReplicationError(JaxcommError, AssertionError):
    """A tree that should be the same on all ranks is not."""


class StallError(JaxcommError):
    """Some ranks did not arrive within the time that `init(timeout=)` allows."""


class BrokenCommunicatorError(JaxcommError):
    """A communicator can no longer be used; the text says what failed first."""


class TransportUnavailableError(JaxcommError):
    """The transport asked for cannot be used in this process."""


class UnsupportedDtypeError(JaxcommError, TypeError):
    """A leaf's dtype cannot be reduced with this op over this transport."""


class UnsupportedCollectiveError(JaxcommError, TypeError):
    """A decorated function uses a named-axis collective that is not scheduled yet."""


class InvalidTreeError(JaxcommError, TypeError):
    """A leaf of the tree is not an array."""


class InvalidOptionError(JaxcommError, ValueError):
    """An option of a collective, a decorator or `init` has an unusable value."""


class CheckpointError(JaxcommError):
    """A checkpoint cannot be written, is damaged, or does not fit the job."""
