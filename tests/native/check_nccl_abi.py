#!/usr/bin/env python3
"""Compare jaxcomm/native/src/nccl/nccl_abi.h with the nccl.h of NCCL's releases.

`check_nccl_abi.py` takes the headers out of the wheels on the package index that pip is
configured for. The wheels have hundreds of megabytes, so only the parts of interest are
read, by HTTP ranges, and kept in build/nccl-headers. `--offline` uses what is there or
installed with Python or with the system. Needs a C++ compiler, but no CUDA.

Exit status: 0 when all agree, 1 when one does not, 77 when there is no header.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import site
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "jaxcomm" / "native" / "src" / "nccl" / "nccl_abi.h"
CACHE = ROOT / "build" / "nccl-headers"
PROJECTS = ["nvidia-nccl-cu12", "nvidia-nccl-cu13"]
MEMBER = "nvidia/nccl/include/nccl.h"

# What nccl.h includes of CUDA, as far as it needs it.
STUBS = {
    "cuda_runtime.h": """
#include <stdlib.h>
#define CUDART_VERSION 12000
typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
""",
    "cuda_fp16.h": "",
    "cuda_bf16.h": "#define __CUDA_BF16_TYPES_EXIST__\n",
    "cuda_fp8.h": "",
}

# Ours: theirs.
FIELDS = {
    "size": "size",
    "magic": "magic",
    "version": "version",
    "blocking": "blocking",
    "cga_cluster_size": "cgaClusterSize",
    "min_ctas": "minCTAs",
    "max_ctas": "maxCTAs",
    "net_name": "netName",
    "split_share": "splitShare",
}
TYPES = {
    "NcclComm": "std::remove_pointer_t<ncclComm_t>",
    "NcclUniqueId": "ncclUniqueId",
    "NcclConfig": "ncclConfig_t",
    "NcclResult": "ncclResult_t",
    "NcclDType": "ncclDataType_t",
    "NcclOp": "ncclRedOp_t",
    "NcclResidence": "ncclScalarResidence_t",
    "void": "std::remove_pointer_t<cudaStream_t>",
}

# Same<ours, theirs>: passed alike and meaning the same.
PRELUDE = """
#include <nccl.h>
#include <cstddef>
#include <type_traits>
#include "nccl_abi.h"
using namespace jaxcomm;
template <class A, class B> struct Same : std::is_same<A, B> {};
template <class A, class B> struct Same<A*, B*> : Same<A, B> {};
template <class... A> struct List {};
template <class A, class B> struct SameLists : std::false_type {};
template <> struct SameLists<List<>, List<>> : std::true_type {};
template <class A, class... As, class B, class... Bs>
struct SameLists<List<A, As...>, List<B, Bs...>>
    : std::conjunction<Same<A, B>, SameLists<List<As...>, List<Bs...>>> {};
template <class R, class... A, class S, class... B>
struct Same<R (*)(A...), S (*)(B...)>
    : SameLists<List<R, A...>, List<S, B...>> {};
constexpr ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
constexpr NcclConfig ours;
"""


def functions(declarations: str) -> list[str]:
    return re.findall(r"^  X\((\w+),", declarations, flags=re.MULTILINE)


def program(declarations: str) -> str:
    """Return C++ that compiles where our header agrees with nccl.h."""
    lines = [PRELUDE]
    for ours, theirs in TYPES.items():
        lines.append(
            f"template <> struct Same<{ours}, {theirs}> : std::true_type {{}};"
        )

    def check(condition: str, message: str) -> None:
        lines.append(f'static_assert({condition}, "{message}");')

    for ours, theirs in TYPES.items():
        if ours not in ("void", "NcclComm", "NcclConfig"):
            check(f"sizeof({ours}) == sizeof({theirs})", f"size of {theirs}")
            check(f"alignof({ours}) == alignof({theirs})", f"alignment of {theirs}")
    check("alignof(NcclConfig) == alignof(ncclConfig_t)", "alignment of the config")
    check("sizeof(NcclConfig) <= sizeof(ncclConfig_t)", "size of the config")
    check("sizeof(ncclUniqueId) == 128", "size of the unique id")
    for ours, theirs in FIELDS.items():
        same = f"offsetof(NcclConfig, {ours}) == offsetof(ncclConfig_t, {theirs})"
        check(same, f"offset of {theirs}")
        same = f"Same<decltype(NcclConfig::{ours}), decltype(ncclConfig_t::{theirs})>"
        check(f"{same}::value", f"type of {theirs}")
        if ours not in ("size", "version"):
            check(f"ours.{ours} == theirs.{theirs}", f"initial {theirs}")
    check("ours.version == NCCL_VERSION(2, 18, 1)", "how versions are coded")
    check("ours.version <= theirs.version", "our version is not of the future")
    for name in re.findall(r"^  kNccl(\w+) = \d", declarations, flags=re.MULTILINE):
        check(f"int(kNccl{name}) == int(nccl{name})", f"value of nccl{name}")
    for name in functions(declarations):
        ours, theirs = f"decltype(NcclFunctions::{name})", f"decltype(&nccl{name})"
        check(f"Same<{ours}, {theirs}>::value", f"signature of nccl{name}")
    return "\n".join(lines) + "\n"


def problems(header: Path, declarations: str) -> list[str]:
    """Return what our declarations say otherwise than this nccl.h."""
    text = header.read_text()
    names = functions(declarations)
    missing = [n for n in names if not re.search(rf"\bnccl{n}\s*\(", text)]
    if missing:
        return [f"nccl{name} is not declared" for name in missing]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for name, stub in STUBS.items():
            (here / name).write_text(stub)
        (here / "nccl.h").write_text(text)
        (here / "nccl_abi.h").write_text(declarations)
        (here / "check.cc").write_text(program(declarations))
        line = ["c++", "-std=c++17", "-fsyntax-only", f"-I{here}"]
        run = subprocess.run(
            [*line, str(here / "check.cc")], capture_output=True, text=True, check=False
        )
    errors = re.findall(r"error: (.*)", run.stderr)
    return errors or ([run.stderr] if run.returncode else [])


class RemoteFile(io.RawIOBase):
    """A file on a web server, read by ranges."""

    def __init__(self, session: Any, url: str):
        self.session, self.url, self.at = session, url, 0
        with self.part("bytes=0-0") as answer:
            self.size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def part(self, span: str) -> Any:
        headers = {"Range": span, "Accept-Encoding": "identity"}
        answer = self.session.get(self.url, headers=headers, stream=True)
        if answer.status_code != 206:
            answer.close()
            raise OSError(f"no ranges from this index (status {answer.status_code})")
        return answer

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        with self.part(f"bytes={self.at}-{end - 1}") as answer:
            data = answer.content
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def version_key(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def fetch(project: str, oldest: str, few: bool) -> None:
    """Fill the cache from pip's index, through pip's own finder and session.

    Of the releases since `oldest`; with `few`, of the first and the last of them.
    """
    from pip._internal.commands import create_command

    command: Any = create_command("download")
    options, _ = command.parse_args(["--no-deps", "--quiet", project])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        links = {
            str(candidate.version): candidate.link
            for candidate in finder.find_all_candidates(project)
            if candidate.link.is_wheel
        }
        versions = sorted(links, key=version_key)
        versions = [v for v in versions if version_key(v) >= version_key(oldest)]
        for version in versions[:: max(len(versions) - 1, 1)] if few else versions:
            link, target = links[version], CACHE / f"{project}-{version}.h"
            if target.exists():
                continue
            try:
                remote = RemoteFile(session, link.url_without_fragment)
                with zipfile.ZipFile(io.BufferedReader(remote, 1 << 16)) as wheel:
                    text = wheel.read(MEMBER)
            except (OSError, KeyError, zipfile.BadZipFile) as error:
                print(f"{project} {version}: no header ({error})", file=sys.stderr)
                continue
            CACHE.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)


def download(project: str, version: str) -> None:
    """Fill the cache with one version by downloading its wheel, whatever its size."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder]
        subprocess.run([*line, f"{project}=={version}"], check=True)
        for wheel in Path(folder).glob("*.whl"):
            CACHE.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                text = archive.read(MEMBER)
            (CACHE / f"{project}-{version}.h").write_bytes(text)


def local_headers() -> Iterator[tuple[str, Path]]:
    """Yield the names and paths of all headers at hand."""
    cached = sorted(CACHE.glob("*.h"), key=lambda p: (p.stem[:16], version_key(p.stem)))
    for path in cached:
        yield path.stem, path
    folders = [Path(p) / "nvidia" / "nccl" / "include" for p in site.getsitepackages()]
    for folder in [*folders, Path("/usr/include"), Path("/usr/local/cuda/include")]:
        if (folder / "nccl.h").exists():
            yield str(folder / "nccl.h"), folder / "nccl.h"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    parser.add_argument("--oldest", default="2.18", help="the oldest version fetched")
    parser.add_argument(
        "--few", action="store_true", help="the oldest and the newest releases only"
    )
    parser.add_argument(
        "--download", metavar="VERSION", help="fetch this one as a whole wheel"
    )
    options = parser.parse_args()
    if not options.offline:
        for project in PROJECTS:
            if options.download:
                download(project, options.download)
            else:
                with contextlib.suppress(KeyboardInterrupt):
                    fetch(project, options.oldest, options.few)
    found = 0
    failed = 0
    for name, path in local_headers():
        wrong = problems(path, OURS.read_text())
        found += 1
        failed += bool(wrong)
        print(f"{name}: {'; '.join(wrong[:5]) or 'agrees'}", flush=True)
    if not found:
        print("no nccl.h here; run tests/native/check_nccl_abi.py with a network")
        return 77
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
