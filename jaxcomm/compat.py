"""The only file that touches version-dependent JAX names (jax 0.10.2 to 0.12)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os.path
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

# No public module offers these; each has been at this place from 0.10.2 to 0.12.0.1.
from jax._src import core as _core
from jax._src import distributed as _distributed
from jax._src import effects as _effects
from jax._src import source_info_util as _source_info
from jax._src import xla_bridge as _xla_bridge
from jax._src.interpreters import partial_eval as _partial_eval
from jax._src.lib.mlir.dialects import hlo as _hlo
from jax.extend.core import Literal, Primitive
from jax.interpreters import ad, batching, mlir

from jaxcomm.errors import UnsupportedCollectiveError

__all__ = [
    "AXIS_INDEX",
    "CALLS",
    "CALL_ERRORS",
    "CHECKPOINTS",
    "COND",
    "SCAN",
    "WHILE",
    "Checkpoint",
    "DistributedClient",
    "Effect",
    "JaxRuntimeError",
    "Primitive",
    "Scan",
    "Tracer",
    "While",
    "abstract_token",
    "ad",
    "async_dispatch",
    "axes",
    "axis_groups",
    "backend_names",
    "backends_initialized",
    "batching",
    "branches",
    "broadcast_root",
    "called",
    "checkpoint",
    "closed",
    "count_in_module",
    "create_token",
    "distributed_client",
    "eval_eqn",
    "exchange_layout",
    "failing_call",
    "gather_layout",
    "gloo_listens_on",
    "inner_eqns",
    "instantiate_zeros",
    "is_drop_var",
    "is_var",
    "join_distributed",
    "keeps_its_place",
    "key_impl",
    "leave_distributed",
    "literal",
    "mlir",
    "named",
    "outside_trace",
    "parameters",
    "permutation",
    "print_parameters",
    "process_count",
    "register_ordered_effect",
    "scan",
    "scatter_layout",
    "set_async_dispatch",
    "shaped_array",
    "source_line",
    "start_backends",
    "sub_jaxprs",
    "trace_shard_map",
    "trace_with_axis",
    "while_loop",
    "zero_tangent",
]

Tracer = _core.Tracer
# What a compiled function raises for an error of one of its calls: the second where JAX
# dispatches without Python.
JaxRuntimeError: type[Exception] = jax.errors.JaxRuntimeError
CALL_ERRORS = (JaxRuntimeError, ValueError)
shaped_array = _core.ShapedArray
abstract_token = _core.abstract_token
Effect = _effects.Effect


def outside_trace() -> bool:
    """Tell whether no trace is under way: no jit, and no eager grad or vmap either."""
    return _core.trace_state_clean()


def backends_initialized() -> bool:
    """Tell whether JAX's clients have been made."""
    return _xla_bridge.backends_are_initialized()


@contextlib.contextmanager
def gloo_listens_on(address: str) -> Iterator[None]:
    """Let gloo, while JAX makes its backend, listen on one address alone.

    It would take the address of the host's name, which may be a public one.
    """
    library: Any = vars(_xla_bridge)["_jax"]
    make = library.make_gloo_tcp_collectives
    library.make_gloo_tcp_collectives = functools.partial(make, hostname=address)
    try:
        yield
    finally:
        library.make_gloo_tcp_collectives = make


def process_count() -> int:
    """Return how many processes JAX knows of; starts its backends."""
    return jax.process_count()


def start_backends() -> None:
    """Make JAX's backends, if they are not there yet."""
    jax.local_devices()


def backend_names() -> tuple[str, ...]:
    """Return what the running backend may be called; starts it."""
    device: Any = jax.local_devices()[0]
    names = (jax.default_backend(), device.platform, device.client.platform)
    return tuple(dict.fromkeys(names))


def async_dispatch() -> bool:
    """Tell whether programs for the CPU are left to a pool of threads."""
    return _xla_bridge._CPU_ENABLE_ASYNC_DISPATCH.value


def set_async_dispatch(on: bool) -> None:
    """Say whether they are; before the clients are made."""
    jax.config.update("jax_cpu_enable_async_dispatch", on)


def count_in_module(ctx: Any, what: str) -> int:
    """Return how often this was asked before while the same module was lowered."""
    # What a module's contexts have in common, whatever part of it they are for.
    shared = ctx.module_context.cached_primitive_lowerings
    shared[what] = shared.get(what, 0) + 1
    return shared[what] - 1


def create_token() -> Any:
    """Return a fresh HLO token, inside a lowering rule."""
    return _hlo.create_token()


def register_ordered_effect(effect: Effect) -> None:
    """Allow an ordered effect wherever JAX asks for permission."""
    kind = type(effect)
    _effects.ordered_effects.add_type(kind)
    _effects.lowerable_effects.add_type(kind)
    _effects.control_flow_allowed_effects.add_type(kind)
    _effects.custom_derivatives_allowed_effects.add_type(kind)
    # A rematerialised function keeps the results of calls with effects: they are made
    # once.
    _effects.remat_allowed_effects.add_type(kind)
    # Without this the call is gone where a scan is differentiated and nobody uses its
    # result: one rank that drops a result would not call, and the others would wait.
    _effects.partial_eval_kept_effects.add_type(kind)


def keeps_its_place(eqn: Any) -> bool:
    """Tell whether an equation must stay in order with others that have effects.

    Ordered callbacks must, and reads and writes of references.
    """
    return any(
        isinstance(effect, _effects.JaxprInputEffect)
        or _effects.ordered_effects.contains(effect)
        for effect in eqn.effects
    )


def trace_with_axis(
    fun: Callable[..., Any], axis_name: str, size: int, args: Sequence[Any]
) -> tuple[Any, Any]:
    """Trace `fun(*args)` with a named axis in scope; (closed jaxpr, output shapes)."""
    traced = jax.make_jaxpr(fun, axis_env=[(axis_name, size)], return_shape=True)
    return traced(*args)


def trace_shard_map(
    fun: Callable[..., Any],
    axis_name: str,
    size: int,
    args: Sequence[Any],
    local: Sequence[Any],
    local_results: Sequence[Any] = (),
) -> tuple[Any, Any]:
    """Trace a function of global arrays that calls `jax.shard_map`, for one rank.

    Args:
      fun: takes and returns whole arrays, and does nothing with them but call
        functions that `jax.shard_map` made, over a mesh of `axis_name` alone.
      axis_name: the axis.
      size: its length.
      args: shapes of whole arrays.
      local: shapes of the blocks that one rank has of each.
      local_results: likewise of the results, where some may be constants.

    Returns:
      A closed jaxpr of the blocks, with the collectives that `trace_with_axis` would
      give; and the shapes of the whole results.
    """
    empty = jax.sharding.AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(empty):
        traced, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    block = _Block(axis_name, size).program(traced, local, local_results)
    return block, shapes


class _Block:
    """Writes jaxprs of `jax.shard_map` down as one rank's program.

    Types that say how a value varies along the axis go, and so do the equations that
    only change these types.
    """

    _CASTS = frozenset({"pvary", "pcast"})

    class _Constant(NamedTuple):
        """An array that one number fills."""

        eqn: Any

    # Where arrays are whole, these do to each block what they do to all of them.
    _ELEMENTWISE = frozenset(
        {"add_any", "convert_element_type", "copy", "div", "mul", "neg"}
    )

    def __init__(self, axis_name: str, size: int):
        # Equations as they are without those types.
        axis = [(axis_name, size)]

        def plain(fun: Callable[[Any], Any]) -> Any:
            return jax.make_jaxpr(fun, axis_env=axis)(1.0).jaxpr.eqns[-1]

        self._plain = {
            "psum_invariant": plain(lambda x: jax.lax.psum(x, axis_name)),
            "all_gather_invariant": plain(lambda x: jax.lax.all_gather(x, axis_name)),
        }
        self._context = self._plain["psum_invariant"].ctx
        self._mesh = plain(jax.jit(lambda x: x + 1)).params.get("ctx_mesh")

    def program(
        self, traced: Any, local: Sequence[Any], local_results: Sequence[Any]
    ) -> Any:
        jaxpr = traced.jaxpr
        eqns: list[Any] = []
        env: dict[Any, Any] = {}
        constvars = [self._fresh(var, env) for var in jaxpr.constvars]
        invars = []
        for var, block in zip(jaxpr.invars, local, strict=True):
            aval = _core.ShapedArray(tuple(block.shape), block.dtype)
            env[var] = _core.Var(aval)
            invars.append(env[var])
        self._outside(jaxpr, env, eqns)
        outvars = [
            self._whole(var, env, local_results[k].shape if local_results else (), eqns)
            for k, var in enumerate(jaxpr.outvars)
        ]
        new = jaxpr.replace(
            constvars=constvars, invars=invars, outvars=outvars, eqns=eqns
        )
        return traced.replace(jaxpr=new) if new is not traced else new

    def _whole(
        self, var: Any, env: dict[Any, Any], shape: tuple[int, ...], out: list[Any]
    ) -> Any:
        """Read what is whole, or a block of it; make a block of a constant."""
        found = self._read(var, env)
        if not isinstance(found, self._Constant):
            return found
        aval = _core.ShapedArray(tuple(shape), found.eqn.outvars[0].aval.dtype)
        made = _core.Var(aval)
        params = {**found.eqn.params, "shape": aval.shape, "sharding": None}
        values = [literal(v.val, self._type(v.aval)) for v in found.eqn.invars]
        out.append(
            found.eqn.replace(
                invars=values, outvars=[made], params=params, ctx=self._context
            )
        )
        return made

    def _outside(self, jaxpr: Any, env: dict[Any, Any], out: list[Any]) -> None:
        """Put the bodies of `jax.shard_map` in place of its equations."""
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if name == "shard_map" or name in CALLS:
                body = called(eqn)
                inner = getattr(body, "jaxpr", body)
                values = [self._read(var, env) for var in eqn.invars]
                if name == "shard_map":
                    values = [
                        self._whole(outer, env, own.aval.shape, out)
                        for outer, own in zip(eqn.invars, inner.invars, strict=True)
                    ]
                names = dict(zip(inner.invars, values, strict=True))
                consts = getattr(body, "consts", ())
                for var, value in zip(inner.constvars, consts, strict=True):
                    names[var] = literal(value, self._type(var.aval))
                run = self._inside if name == "shard_map" else self._outside
                run(inner, names, out)
                for var, result in zip(eqn.outvars, inner.outvars, strict=True):
                    env[var] = self._read(result, names)
            elif name == "broadcast_in_dim" and not any(map(is_var, eqn.invars)):
                (result,) = eqn.outvars
                env[result] = self._Constant(eqn)  # how much is needed, its use says
            elif name in self._ELEMENTWISE:
                operands = [self._read(var, env) for var in eqn.invars]
                (result,) = eqn.outvars
                shape = max((v.aval.shape for v in operands), key=len)
                aval = _core.ShapedArray(shape, result.aval.dtype)
                env[result] = _core.Var(aval)
                out.append(
                    eqn.replace(
                        invars=operands, outvars=[env[result]], ctx=self._context
                    )
                )
            else:
                raise UnsupportedCollectiveError(
                    f"{name} at {source_line(eqn)} on whole arrays, outside the body "
                    "of shard_map, cannot be done by one rank"
                )

    def _inside(self, jaxpr: Any, env: dict[Any, Any], out: list[Any]) -> None:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if name in self._CASTS:
                for var, value in zip(eqn.outvars, eqn.invars, strict=True):
                    env[var] = self._read(value, env)
                continue
            primitive = eqn.primitive
            params = {key: self._parameter(key, v) for key, v in eqn.params.items()}
            if (plain := self._plain.get(name)) is not None:
                primitive = plain.primitive
                params = {key: params.get(key, v) for key, v in plain.params.items()}
            out.append(
                eqn.replace(
                    primitive=primitive,
                    params=params,
                    invars=[self._read(var, env) for var in eqn.invars],
                    outvars=[self._fresh(var, env) for var in eqn.outvars],
                    ctx=self._context,
                )
            )

    def _parameter(self, key: str, value: Any) -> Any:
        found: Any = value
        if isinstance(value, tuple | list):
            kind: Any = type(value)
            parts = [self._parameter("", v) for v in value]
            # A named tuple, as convolutions have, takes its fields one by one.
            return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
        if hasattr(found, "jaxpr") and hasattr(found, "consts"):
            return found.replace(jaxpr=self._body(found.jaxpr))
        if isinstance(found, _core.Jaxpr):
            return self._body(found)
        if key == "ctx_mesh":
            return self._mesh
        if key in ("sharding", "out_sharding"):
            return None
        return value

    def _body(self, jaxpr: Any) -> Any:
        env: dict[Any, Any] = {}
        eqns: list[Any] = []
        constvars = [self._fresh(var, env) for var in jaxpr.constvars]
        invars = [self._fresh(var, env) for var in jaxpr.invars]
        self._inside(jaxpr, env, eqns)
        outvars = [self._read(var, env) for var in jaxpr.outvars]
        return jaxpr.replace(
            constvars=constvars, invars=invars, outvars=outvars, eqns=eqns
        )

    def _fresh(self, var: Any, env: dict[Any, Any]) -> Any:
        kind = _core.DropVar if is_drop_var(var) else _core.Var
        env[var] = kind(self._type(var.aval))
        return env[var]

    def _read(self, var: Any, env: dict[Any, Any]) -> Any:
        return env[var] if is_var(var) else literal(var.val, self._type(var.aval))

    @staticmethod
    def _type(aval: Any) -> Any:
        if not isinstance(aval, _core.ShapedArray):
            return aval
        return _core.ShapedArray(aval.shape, aval.dtype, weak_type=aval.weak_type)


def eval_eqn(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation with new operands of the same types.

    Inside a trace the equation is written down again as it stands; to bind its
    primitive anew would repeat all of JAX's checks, four times as slowly.
    """
    stack = _source_info.current_name_stack()
    trace = _core.trace_ctx.trace
    if isinstance(trace, _partial_eval.DynamicJaxprTrace) and not eqn.effects:
        source = eqn.source_info
        if stack.stack:
            source = source.replace(name_stack=stack + source.name_stack)
        return trace.emit_eqn(
            [trace.to_jaxpr_tracer(value, source) for value in values],
            [var.aval for var in eqn.outvars],
            eqn.primitive,
            eqn.params,
            eqn.effects,
            source,
            eqn.ctx,
        )
    params = eqn.primitive.get_bind_params(eqn.params)
    stack = stack + eqn.source_info.name_stack
    with (
        _source_info.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def instantiate_zeros(tangent: Any) -> Any:
    """Return an array of zeros for a symbolic zero, else the tangent itself."""
    return ad.instantiate_zeros(tangent)


def zero_tangent(primal: Any) -> Any:
    """Return the symbolic zero tangent of a value."""
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


def is_drop_var(var: Any) -> bool:
    """Tell whether an equation's output is discarded."""
    return isinstance(var, _core.DropVar)


def key_impl(dtype: Any) -> str:
    """Return the name of the generator that a dtype of typed PRNG keys is for."""
    return dtype._impl.name


def is_var(value: Any) -> bool:
    """Tell an equation's variable from a literal."""
    return not isinstance(value, Literal)


def literal(value: Any, aval: Any) -> Literal:
    """Return a literal that stands for a constant in an equation."""
    return Literal(value, aval)


def sub_jaxprs(eqn: Any) -> list[Any]:
    """Return the open jaxprs among an equation's parameters."""
    return list(_core.jaxprs_in_params(eqn.params))


def inner_eqns(eqn: Any) -> Iterator[Any]:
    """Yield the equations of the jaxprs among an equation's parameters."""
    for jaxpr in sub_jaxprs(eqn):
        yield from jaxpr.eqns


# Equations, by the names of their primitives, and what their parameters say.

SCAN, WHILE, COND = "scan", "while", "cond"
CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})
# Their bodies' equations may simply stand in place of the call.
CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "custom_lin",
    }
)
AXIS_INDEX = "axis_index"


class Scan(NamedTuple):
    """A `lax.scan`; its operands are constants, a state, and what is scanned."""

    body: Any
    consts: int
    carry: int
    length: int
    reverse: bool
    unroll: int


class While(NamedTuple):
    """A `lax.while_loop`: its operands are constants of both bodies, and the state."""

    test: Any
    step: Any
    test_consts: int
    step_consts: int


class Checkpoint(NamedTuple):
    """A `jax.checkpoint`."""

    body: Any
    prevent_cse: bool
    policy: Any


def scan(eqn: Any) -> Scan:
    """Read the equation of a `lax.scan`."""
    found = eqn.params
    if "num_consts" in found:  # up to jax 0.11
        consts, carry = found["num_consts"], found["num_carry"]
    else:
        consts, carry, _ = (len(list(part)) for part in found["ft_in"].unpack())
    keys = ("length", "reverse", "unroll")
    return Scan(found["jaxpr"], consts, carry, *(found[key] for key in keys))


def while_loop(eqn: Any) -> While:
    """Read the equation of a `lax.while_loop`."""
    keys = ("cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts")
    return While(*(eqn.params[key] for key in keys))


def branches(eqn: Any) -> list[Any]:
    """Return the bodies of a `lax.cond` or `lax.switch`."""
    return list(eqn.params["branches"])


def checkpoint(eqn: Any) -> Checkpoint:
    """Read the equation of a `jax.checkpoint`."""
    found = eqn.params
    return Checkpoint(found["jaxpr"], found["prevent_cse"], found["policy"])


def called(eqn: Any) -> Any:
    """Return the body of a call, open or closed; None where it cannot be read."""
    keys = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return next((eqn.params[key] for key in keys if key in eqn.params), None)


def closed(eqn: Any, body: Any) -> Any:
    """Return the closed form of an equation's only body, where it has constants."""
    values = eqn.params.values()
    return next((v for v in values if getattr(v, "jaxpr", None) is body), body)


def named(eqn: Any) -> str | None:
    """Return what `checkpoint_name` was given; None for all other equations."""
    return eqn.params["name"] if eqn.primitive.name == "name" else None


def parameters(eqn: Any) -> str:
    """Return an equation's parameters as text, the same for equal equations."""
    return str(sorted(eqn.params.items(), key=lambda pair: pair[0]))


def print_parameters(
    primitive: Primitive, shown: Callable[..., dict[str, Any]]
) -> None:
    """Let jaxprs show of a primitive's parameters what a function makes of them."""

    def rule(eqn: Any, context: Any, settings: Any) -> Any:
        eqn = eqn.replace(params=shown(**eqn.params))
        return _core._pp_eqn(eqn, context, settings)

    _core.pp_eqn_rules[primitive] = rule


def axes(eqn: Any) -> tuple[Any, ...]:
    """Return the axes of a collective: names, and numbers that vmap has left."""
    value = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def axis_groups(eqn: Any) -> tuple[tuple[int, ...], ...]:
    """Return the `axis_index_groups` of a collective; () where it has none."""
    return tuple(map(tuple, eqn.params.get("axis_index_groups") or ()))


def gather_layout(eqn: Any) -> tuple[int, bool]:
    """Return the dimension of an `all_gather`, and whether it is tiled."""
    return eqn.params["all_gather_dimension"], eqn.params["tiled"]


def scatter_layout(eqn: Any) -> tuple[int, bool]:
    """Return the dimension of a `psum_scatter`, and whether it is tiled."""
    return eqn.params["scatter_dimension"], eqn.params["tiled"]


def exchange_layout(eqn: Any) -> tuple[int, int]:
    """Return the axis that an `all_to_all` divides, and that which it concatenates.

    The primitive always does, whatever lax.all_to_all was told.
    """
    return eqn.params["split_axis"], eqn.params["concat_axis"]


def broadcast_root(eqn: Any) -> int:
    """Return the rank whose values a `pbroadcast` sends."""
    return eqn.params["source"]


def permutation(eqn: Any) -> tuple[tuple[int, int], ...]:
    """Return the (source, target) pairs of a `ppermute`."""
    return tuple((int(source), int(target)) for source, target in eqn.params["perm"])


def failing_call(error: BaseException) -> str:
    """Return which JAX function raised, and the user's line that called it."""
    jax_folder = os.path.dirname(jax.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    for outer, inner in reversed(list(itertools.pairwise(frames))):
        if inner.filename.startswith(jax_folder) and not outer.filename.startswith(
            (jax_folder, os.path.dirname(__file__))
        ):
            name = os.path.basename(outer.filename)
            return f"{_public_name(frames, inner)} at {name}:{outer.lineno}"
    return "at an unknown line"


def _public_name(frames: Any, first: Any) -> str:
    """The name of JAX's own function below wrappers, from its module of collectives."""
    at = list(frames).index(first)
    for frame in frames[at:]:
        if os.path.basename(frame.filename) == "parallel.py":
            return frame.name
    return first.name


def source_line(eqn: Any) -> str:
    """Return the user's `file.py:line (function)` of an equation, or ""."""
    ours = os.path.dirname(__file__) + os.sep
    frames = _source_info.user_frames(eqn.source_info.traceback)
    frame = next((f for f in frames if not f.file_name.startswith(ours)), None)
    if frame is None:
        return ""
    name = os.path.basename(frame.file_name)
    function = frame.function_name.rsplit(".", 1)[-1]
    return f"{name}:{frame.start_line} ({function})"


class DistributedClient:
    """The key-value store that the processes of jax.distributed share.

    A key is a path. JAX's errors pass through, but for the end of the time in `get`.

    Attributes:
      process_id: this process's number, as given to jax.distributed.initialize.
      num_processes: how many there are.
    """

    def __init__(self, client: Any, process_id: int, num_processes: int):
        self._client = client
        self.process_id, self.num_processes = process_id, num_processes

    def set(self, key: str, value: bytes) -> None:
        """Write a key that is not there yet."""
        self._client.key_value_set_bytes(key, value)

    def get(self, key: str, seconds: float) -> bytes | None:
        """Wait until a key is there; None when `seconds` have passed."""
        milliseconds = math.ceil(1e3 * min(max(seconds, 1e-3), 1e6))
        try:
            return self._client.blocking_key_value_get_bytes(key, milliseconds)
        except JaxRuntimeError as error:
            if str(error).startswith("DEADLINE_EXCEEDED"):
                return None
            raise

    def list(self, folder: str) -> dict[str, bytes]:
        """Return the keys below a folder, in full, with their values."""
        return dict(self._client.key_value_dir_get_bytes(folder))

    def delete(self, folder: str) -> None:
        """Delete a key and all below it, if there are any."""
        self._client.key_value_delete(folder)


def distributed_client() -> DistributedClient | None:
    """Return the client of jax.distributed, or None where that is not initialised.

    Asks for no devices: jax.process_index() would start the backends.
    """
    state = _distributed.global_state
    if state.client is None:
        return None
    return DistributedClient(state.client, state.process_id, state.num_processes)


def join_distributed(
    address: str, process_id: int, num_processes: int, seconds: int
) -> None:
    """Connect to a coordination service that runs, as jax.distributed.initialize does.

    Unlike that it starts no service, leaves SIGTERM to Python, and has no heartbeats:
    a process that is stopped for a while is not taken for dead.
    """
    library: Any = vars(_xla_bridge)["_jax"]
    client = library.get_distributed_runtime_client(
        address,
        process_id,
        init_timeout=seconds,
        heartbeat_timeout=10**7,
        shutdown_on_destruction=False,
        use_compression=True,
    )
    client.connect()
    state = _distributed.global_state
    state.client, state.coordinator_address = client, address
    state.process_id, state.num_processes = process_id, num_processes


def leave_distributed() -> None:
    """Forget the client that `join_distributed` made; others are not told."""
    _distributed.global_state.client = None
