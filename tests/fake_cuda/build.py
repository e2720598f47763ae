"""Build the stand-in CUDA libraries against the headers of the CUDA wheels: python build.py OUTPUT

Needs g++, PyPI's CUDA build of torch in this environment, and the `crt/` headers (`pip install nvidia-cuda-crt`).
A stand-in defines what manyrank's runs call. The other symbols that the real library exports are generated here, so that
whatever links against it loads.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "libraries"
WHEELS = Path(sysconfig.get_path("purelib"))
INCLUDES = (WHEELS / "nvidia/cu13/include", WHEELS / "nvidia/nccl/include")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-w", *(f"-I{folder}" for folder in INCLUDES))
SUCCEED = "int {name}(void) {{ return 0; }}"


@dataclass(frozen=True)
class Library:
    """A stand-in.

    Attributes:
        source: its file. soname: its name for the loader.
        symbols: a pattern of the names that it exports. of: the file where they stand.
        other: the C code of one that the source does not define.
        version: the symbol version of the real library, if its symbols have one.
    """

    source: str
    soname: str
    symbols: str
    of: Path
    other: str
    version: str | None = None


CU13 = WHEELS / "nvidia/cu13"
MISSING = 'int {name}(void) {{ fprintf(stderr, "FAKECUDA has no {name}\\n"); return 801; }}'
LIBRARIES = (
    Library("cudart", "libcudart.so.13", r"(__)?cuda\w+", CU13 / "lib/libcudart.so.13", MISSING, "libcudart.so.13"),
    Library("cublas", "libcublas.so.13", r"cublas[A-Z]\w+", CU13 / "lib/libcublas.so.13", SUCCEED, "libcublas.so.13"),
    Library(
        "cublaslt", "libcublasLt.so.13", r"cublas[A-Z]\w+", CU13 / "lib/libcublasLt.so.13", SUCCEED, "libcublasLt.so.13"
    ),
    Library("nccl", "libnccl.so.2", r"p?nccl[A-Z]\w+", WHEELS / "nvidia/nccl/lib/libnccl.so.2", SUCCEED),
    Library("cuda", "libcuda.so.1", r"\bcu[A-Z]\w+(?=\s*\()", CU13 / "include/cuda.h", SUCCEED),
    Library(
        "nvml",
        "libnvidia-ml.so.1",
        r'(?<=")nvml[A-Z]\w+(?=")',
        WHEELS / "pynvml.py",
        "int {name}(void) {{ return 3; }}",
    ),
)


def names(library: Library) -> set[str]:
    """The symbols that the real library exports, as far as its file, its header or its binding tells."""
    if ".so" not in library.of.name:
        return set(re.findall(library.symbols, library.of.read_text(errors="replace")))
    listed = subprocess.run(["nm", "-D", "--defined-only", library.of], capture_output=True, text=True, check=True)
    symbols = (line.split()[-1].split("@")[0] for line in listed.stdout.splitlines())
    return {symbol for symbol in symbols if re.fullmatch(library.symbols, symbol)}


def build(library: Library, folder: Path) -> None:
    """Compile a stand-in and the symbols that it does not define, and link both."""
    source = SOURCES / f"{library.source}.cc"
    defined = set(re.findall(r"\b(\w+)\(", source.read_text()))
    others = folder / f"{library.source}_others.c"
    lines = (library.other.format(name=name) for name in sorted(names(library) - defined))
    others.write_text("#include <stdio.h>\n" + "\n".join(lines) + "\n")
    subprocess.run(["gcc", "-c", "-w", "-fPIC", others, "-o", others.with_suffix(".o")], check=True)
    options = [f"-Wl,-soname,{library.soname}", "-ldl", "-lrt"]
    if library.version:
        versions = folder / f"{library.source}.map"
        versions.write_text(f"{library.version} {{ global: *; }};\n")
        options.append(f"-Wl,--version-script={versions}")
    output = folder / library.soname
    subprocess.run(["g++", "-shared", *FLAGS, source, others.with_suffix(".o"), "-o", output, *options], check=True)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for each in LIBRARIES:
        build(each, target)
