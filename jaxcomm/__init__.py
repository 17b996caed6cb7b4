"""Collective communication for JAX on a static schedule."""

from jaxcomm import errors as errors
from jaxcomm.collectives import all_reduce as all_reduce
from jaxcomm.collectives import broadcast as broadcast
from jaxcomm.collectives import plan as plan
from jaxcomm.communicator import Communicator as Communicator
from jaxcomm.communicator import init as init
from jaxcomm.communicator import local_rank as local_rank
from jaxcomm.communicator import local_size as local_size
from jaxcomm.communicator import rank as rank
from jaxcomm.communicator import size as size
from jaxcomm.communicator import world as world
from jaxcomm.decorators import data_parallel as data_parallel
from jaxcomm.planner import cache_clear as cache_clear
from jaxcomm.planner import cache_info as cache_info
from jaxcomm.replication import assert_replicated as assert_replicated
from jaxcomm.schedule import Schedule as Schedule
from jaxcomm import optax as optax  # isort: skip
