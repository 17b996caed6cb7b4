"""Our declarations of NCCL and of CUDA's driver against their own headers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.native import check_nccl_abi as check


@pytest.fixture(scope="module")
def headers() -> dict[str, Path]:
    """Return the headers of the releases at hand; else fetch the oldest and newest."""
    if not (found := dict(check.local_headers())):
        line = [sys.executable, check.__file__, "--few"]
        try:
            why = subprocess.run(
                line, capture_output=True, text=True, timeout=120, check=False
            ).stderr
        except subprocess.TimeoutExpired as error:
            why = str(error)
        found = dict(check.local_headers())
        if not found:
            pytest.skip(f"no nccl.h here, and none to fetch: {why[-300:]}")
    return found


def test_declarations_agree_with_every_release(headers: dict[str, Path]) -> None:
    ours = check.OURS.read_text()
    wrong = {name: check.problems(path, ours) for name, path in headers.items()}
    assert not any(wrong.values()), {name: p for name, p in wrong.items() if p}


@pytest.mark.parametrize(
    ("text", "other", "shown"),
    [
        ("kNcclBfloat16 = 9", "kNcclBfloat16 = 8", "value of ncclBfloat16"),
        ("int min_ctas = kNcclUndefined;\n", "", "offset of maxCTAs"),
        ("int min_ctas", "unsigned min_ctas", "type of minCTAs"),
        ("char internal[128]", "char internal[64]", "size of ncclUniqueId"),
        ("0xcafebeef", "0xcafebeee", "initial magic"),
        ("X(GroupEnd,", "X(GroupFinish,", "ncclGroupFinish is not declared"),
        (
            "const void* from, size_t count",
            "const void* from, int count",
            "of ncclSend",
        ),
        ("(NcclOp op, NcclComm* comm)", "(NcclOp op)", "signature of ncclRedOpDestroy"),
        (
            "int peer, NcclComm* comm",
            "NcclComm* comm, int peer",
            "signature of ncclRecv",
        ),
        ("int* count", "size_t* count", "signature of ncclCommCount"),
        (
            "NcclDType dtype, NcclOp op",
            "NcclOp op, NcclDType dtype",
            "of ncclAllReduce",
        ),
    ],
)
def test_a_difference_is_noticed(
    headers: dict[str, Path], text: str, other: str, shown: str
) -> None:
    ours = check.OURS.read_text()
    assert text in ours
    header = list(headers.values())[-1]
    wrong = check.problems(header, ours.replace(text, other))
    assert any(shown in problem for problem in wrong), wrong


# Passed alike: pointers are pointers, and all else are integers of a size.
CUDA = """
#include <cuda.h>
#include <type_traits>
#include "cuda_abi.h"
using namespace jaxcomm;
template <class A, class B> constexpr bool alike =
    std::is_pointer_v<A> ? std::is_pointer_v<B>
                         : (!std::is_pointer_v<B> && sizeof(A) == sizeof(B));
template <class A, class B> struct Same;
template <class... A, class... B> struct Same<int (*)(A...), CUresult (*)(B...)> {
  static constexpr bool value = (alike<A, B> && ...);
};
#define CHECK(name, symbol, parameters) \\
  static_assert(Same<decltype(CudaFunctions::name), decltype(&symbol)>::value, #symbol);
JAXCOMM_CUDA_FUNCTIONS(CHECK)
static_assert(kCudaSuccess == CUDA_SUCCESS && kCudaNotReady == CUDA_ERROR_NOT_READY);
static_assert(kCudaCaptureRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);
static_assert(kCudaEventNoTiming == CU_EVENT_DISABLE_TIMING);
"""


@pytest.mark.parametrize(
    ("text", "other", "shown"),
    [
        ("", "", ""),
        ("(CudaStream stream, int* status)", "(CudaStream stream, int s)", "Capturing"),
        ("kCudaNotReady = 600", "kCudaNotReady = 601", "CUDA_ERROR_NOT_READY"),
    ],
)
def test_the_drivers_declarations(
    tmp_path: Path, text: str, other: str, shown: str
) -> None:
    folders = [Path("/usr/local/cuda/include"), Path("/usr/include")]
    found = [folder for folder in folders if (folder / "cuda.h").exists()]
    if not found:
        pytest.skip("no cuda.h here")
    ours = check.OURS.with_name("cuda_abi.h").read_text()
    assert text in ours
    (tmp_path / "cuda_abi.h").write_text(ours.replace(text, other) if text else ours)
    (tmp_path / "check.cc").write_text(CUDA)
    line = ["c++", "-std=c++17", "-fsyntax-only", f"-I{found[0]}", "check.cc"]
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == bool(shown), done.stderr
    assert shown in done.stderr
