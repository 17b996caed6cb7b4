"""NCCL's functions over ctypes; calls return NCCL's results."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = ["int8", "uint8", "int32", "uint32", "int64", "uint64"]
DTYPES += ["float16", "float32", "float64", "bfloat16"]
SUCCESS, CUDA, SYSTEM, INTERNAL, ARGUMENT, USAGE, REMOTE, IN_PROGRESS = range(8)
UNDEFINED = -(2**31)


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


class Config(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        *((name, ctypes.c_int) for name in ("cga", "min_ctas", "max_ctas")),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
        ("padding", ctypes.c_int),
    ]

    @staticmethod
    def of(blocking: int = UNDEFINED) -> Config:
        u = UNDEFINED
        return Config(48, 0xCAFEBEEF, 21801, blocking, u, u, u, None, u, u)


def load(path: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(path)
    lib.ncclGetErrorString.restype = ctypes.c_char_p
    lib.ncclGetLastError.restype = ctypes.c_char_p
    return lib


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def code_of(array: np.ndarray) -> int:
    return DTYPES.index(array.dtype.name)


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Comm:
    def __init__(self, lib: ctypes.CDLL, handle: ctypes.c_void_p, rank: int, size: int):
        self.lib, self.handle, self.rank, self.size = lib, handle, rank, size

    def all_reduce(self, x: np.ndarray, out: np.ndarray, op: int = 0) -> int:
        a, b, n = address(x), address(out), ctypes.c_size_t(x.size)
        return self.lib.ncclAllReduce(a, b, n, code_of(x), op, self.handle, None)

    def broadcast(self, x: np.ndarray, out: np.ndarray, root: int) -> int:
        a, b, n = address(x), address(out), ctypes.c_size_t(out.size)
        return self.lib.ncclBroadcast(a, b, n, code_of(out), root, self.handle, None)

    def all_gather(self, x: np.ndarray, out: np.ndarray) -> int:
        a, b, n = address(x), address(out), ctypes.c_size_t(x.size)
        return self.lib.ncclAllGather(a, b, n, code_of(x), self.handle, None)

    def reduce_scatter(self, x: np.ndarray, out: np.ndarray, op: int = 0) -> int:
        a, b, n = address(x), address(out), ctypes.c_size_t(out.size)
        return self.lib.ncclReduceScatter(a, b, n, code_of(x), op, self.handle, None)

    def send(self, x: np.ndarray, peer: int) -> int:
        n = ctypes.c_size_t(x.size)
        return self.lib.ncclSend(address(x), n, code_of(x), peer, self.handle, None)

    def recv(self, out: np.ndarray, peer: int) -> int:
        n = ctypes.c_size_t(out.size)
        return self.lib.ncclRecv(address(out), n, code_of(out), peer, self.handle, None)

    def split(self, color: int, key: int) -> Comm | None:
        part = ctypes.c_void_p(1)
        out = ctypes.byref(part)
        assert self.lib.ncclCommSplit(self.handle, color, key, out, None) == SUCCESS
        if not part:
            return None
        rank, size = ctypes.c_int(), ctypes.c_int()
        assert self.lib.ncclCommUserRank(part, ctypes.byref(rank)) == SUCCESS
        assert self.lib.ncclCommCount(part, ctypes.byref(size)) == SUCCESS
        return Comm(self.lib, part, rank.value, size.value)

    def pre_mul_sum(self, factor: np.ndarray, residence: int = 1) -> int:
        op, a = ctypes.c_int(), address(factor)
        make = self.lib.ncclRedOpCreatePreMulSum
        code = code_of(factor)
        assert make(ctypes.byref(op), a, code, residence, self.handle) == SUCCESS
        return op.value

    def state(self) -> int:
        result = ctypes.c_int(-1)
        out = ctypes.byref(result)
        assert self.lib.ncclCommGetAsyncError(self.handle, out) == SUCCESS
        return result.value

    def wait(self) -> int:
        """Return the state once it is no longer "in progress"."""
        while self.state() == IN_PROGRESS:
            time.sleep(0.001)
        return self.state()

    def abort(self) -> int:
        return self.lib.ncclCommAbort(self.handle)

    def destroy(self) -> int:
        return self.lib.ncclCommDestroy(self.handle)

    def last_error(self) -> str:
        return self.lib.ncclGetLastError(self.handle).decode()


def init(
    lib: ctypes.CDLL, uid: UniqueId, rank: int, size: int, blocking: int = UNDEFINED
) -> tuple[int, Comm]:
    handle, config = ctypes.c_void_p(), Config.of(blocking)
    make = lib.ncclCommInitRankConfig
    result = make(ctypes.byref(handle), size, uid, rank, ctypes.byref(config))
    return result, Comm(lib, handle, rank, size)
