#!/usr/bin/env python3
"""Packs target/gpu-proof after `make cuda`: proof.py and all that it needs on a machine with a GPU that
has neither Rust nor a network. At most 60 MiB; CUDA's libraries are looked for over there."""

import io
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import cuda

ROOT = cuda.ROOT
FOLDER = ROOT / "target/gpu-proof"
MOST = 60 * 2**20
FIXTURES = ROOT / "engine/tests/fixtures"
# Libraries that every Linux has, in the version of the loader that it has.
EVERYWHERE = re.compile(r"linux-vdso|ld-linux|/lib(c|m|dl|pthread|rt|stdc\+\+|gcc_s)\.so")


def stripped(source, folder):
    """The program without what only debuggers read."""
    target = folder / Path(source).name
    cuda.run("strip", "--strip-unneeded", "-o", target, source)
    return target


def kernel_tests(env):
    """The test programs of engine/cuda, by name."""
    command = ["cargo", "test", "--release", "--locked", "--no-run", "-p", "florence-cuda", "--features", "florence-cuda/cuda"]
    said = cuda.run(*command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True).stderr
    found = dict(re.findall(r"Executable tests/(\w+)\.rs \((.+)\)", said))
    if not {"rows", "products", "vision", "language"} <= found.keys():
        sys.exit(f"the tests of the kernels are not among\n{said}")
    return {name: ROOT / path for name, path in found.items()}


def files(folder):
    """What is packed: names there, files here."""
    env = cuda.environment()
    for name in cuda.BUILT:
        yield name, stripped(cuda.TARGET / "release" / name, folder)
    for name, program in kernel_tests(env).items():
        yield f"kernels-{name}", stripped(program, folder)
    server = shutil.which("redis-server")
    yield "redis-server", stripped(Path(server).resolve(), folder)
    loaded = cuda.run("ldd", server, stdout=subprocess.PIPE, text=True).stdout
    for name, path in re.findall(r"(\S+) => (\S+)", loaded):
        if not EVERYWHERE.search(path):
            yield f"lib/{name}", Path(path).resolve()
    for name in ["tiny.json", "random.json", "random.png"]:
        yield f"goldens/{name}", FIXTURES / name
    for name in ["pictures", "random-native", "random-original"]:
        for file in sorted((FIXTURES / name).iterdir()):
            if not file.name.startswith("florence-packed-"):
                yield f"goldens/{name}/{file.name}", file
    for file in sorted((ROOT / "models/tiny").iterdir()):
        # The weights are part of the programs.
        if file.is_file() and file.suffix == ".json":
            yield f"tiny/{file.name}", file
    for file in sorted((ROOT / "models/tiny/samples").iterdir()):
        yield f"samples/{file.name}", file
    for name in ["fidelity.py", "reference.py", "scenes.py"]:
        yield f"tools/{name}", ROOT / "tools" / name


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        # Programs share most of their bytes, far apart from each other.
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**28}]
        with lzma.open(FOLDER / "payload.tar.xz", "wb", filters=filters) as packed:
            with tarfile.open(fileobj=packed, mode="w") as payload:
                for name, file in files(Path(folder)):
                    entry = tarfile.TarInfo(name)
                    content = file.read_bytes()
                    entry.size = len(content)
                    entry.mode = 0o755 if content[:4] == b"\x7fELF" else 0o644
                    payload.addfile(entry, io.BytesIO(content))
                    print(f"{len(content) / 2**20:8.1f} MiB  {name}")
    shutil.copy(ROOT / "tools/proof.py", FOLDER)
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    print(f"target/gpu-proof: {size / 2**20:.1f} MiB; on a machine with a GPU: python3 proof.py")
    if size > MOST:
        sys.exit("that is too much")


if __name__ == "__main__":
    main()
