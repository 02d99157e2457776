#!/usr/bin/env python3
"""Builds module and command line for CUDA devices, into target/cuda.

Where there is no nvcc, the tool kit is installed from PyPI into target/cuda-toolkit (1.2 GB). A GPU
is not needed. `cuda.py build` builds and shows what came out, `cuda.py run COMMAND` runs a command in
the same environment, `cuda.py registers` shows what the kernels take.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLKIT = ROOT / "target/cuda-toolkit"
TARGET = ROOT / "target/cuda"
REQUIREMENTS = ROOT / "tools/requirements-cuda.txt"
PACKAGES = ["florence-module", "florence-cli"]
FEATURES = [f"{package}/cuda" for package in PACKAGES]
BUILT = ["libflorence.so", "florence"]
# What candle's own kernels are compiled for; drivers of newer devices compile them again.
COMPUTE_CAPABILITY = "80"
# Ours have machine code for these.
ARCHITECTURES = ["sm_80", "sm_90a"]
# Where libraries are looked for after LD_LIBRARY_PATH, before the system's folders.
RUN_PATH = "$ORIGIN/cuda:/usr/local/cuda/lib64"


def run(*command, **options):
    return subprocess.run([str(word) for word in command], check=True, **options)


def installed():
    """The home of a tool kit that is on this machine."""
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path).resolve().parent.parent)
    for home in filter(None, candidates):
        if (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_bf16.h").exists():
            return Path(home)
    return None


def install():
    """A tool kit from PyPI, in the folders that builds look for."""
    home, done = TOOLKIT / "home", TOOLKIT / "installed.txt"
    if done.exists() and done.read_text() == REQUIREMENTS.read_text():
        return home
    print(f"installing the CUDA tool kit into {TOOLKIT.relative_to(ROOT)}", flush=True)
    shutil.rmtree(TOOLKIT, ignore_errors=True)
    run(sys.executable, "-m", "venv", TOOLKIT / "venv")
    pip = TOOLKIT / "venv/bin/pip"
    run(pip, "install", "-q", "--disable-pip-version-check", "--no-cache-dir", "-r", REQUIREMENTS)
    [wheels] = (TOOLKIT / "venv/lib").glob("python3*/site-packages/nvidia/cu13")
    libraries = home / "lib64"
    libraries.mkdir(parents=True)
    for folder in ["bin", "include", "nvvm"]:
        (home / folder).symlink_to(wheels / folder)
    for library in (wheels / "lib").iterdir():
        (libraries / library.name).symlink_to(library)
    for name in ["cudart", "cublas", "cublasLt", "curand", "nvrtc"]:
        [library] = (wheels / "lib").glob(f"lib{name}.so.*")
        (libraries / f"lib{name}.so").symlink_to(library.name)
    done.write_text(REQUIREMENTS.read_text())
    return home


def driver(home):
    """The folder of a libcuda.so to link with: machines without a GPU have no driver."""
    for folder in [home / "lib64/stubs", home / "targets/x86_64-linux/lib/stubs"]:
        if (folder / "libcuda.so").exists():
            return folder
    folder = ROOT / "target/cuda-stub"
    library = folder / "libcuda.so"
    if not library.exists():
        run("cargo", "fetch", "--locked", "-q", cwd=ROOT)
        command = ["cargo", "metadata", "--locked", "--all-features", "--format-version", "1"]
        metadata = json.loads(run(*command, cwd=ROOT, stdout=subprocess.PIPE).stdout)
        [cudarc] = [package for package in metadata["packages"] if package["name"] == "cudarc"]
        source = Path(cudarc["manifest_path"]).parent / "src/driver/sys/mod.rs"
        functions = sorted(set(re.findall(r"\bcu[A-Z]\w*", source.read_text())))
        folder.mkdir(parents=True, exist_ok=True)
        # 100 is CUDA_ERROR_NO_DEVICE.
        code = "".join(f"int {function}() {{ return 100; }}\n" for function in functions)
        (folder / "cuda.c").write_text(code)
        # Whoever runs a program with it finds no device.
        name = "-Wl,-soname,libcuda.so.1"
        run("cc", "-w", "-shared", "-fPIC", name, "-o", library, folder / "cuda.c")
        (folder / "libcuda.so.1").symlink_to("libcuda.so")
    return folder


def environment():
    home = installed() or install()
    stub = driver(home)
    flags = f"-L native={stub} -C link-arg=-Wl,-rpath,{RUN_PATH}"
    names = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR"]
    return {
        **os.environ,
        **dict.fromkeys(names, str(home)),
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "CUDA_COMPUTE_CAP": COMPUTE_CAPABILITY,
        "CUDARC_CUDA_VERSION": "13000",
        "RUSTFLAGS": f"{os.environ.get('RUSTFLAGS', '')} {flags}".strip(),
        "CARGO_TARGET_DIR": str(TARGET),
    }


def libraries(home):
    """Where programs that are run here find the libraries they need, a driver without devices too."""
    folders = [home / "lib64", driver(home)]
    return ":".join(str(folder) for folder in folders)


def registers(env):
    """Compiles the kernels once more, and fails where registers do not suffice."""
    spilled = []
    print(f"{'kernel':32}{'code':10}{'registers':>10}{'shared':>8}{'stack':>8}{'spilled':>8}")
    for architecture in ARCHITECTURES:
        compute = architecture.replace("sm", "compute")
        command = ["nvcc", "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v"]
        command += ["-gencode", f"arch={compute},code={architecture}", "-o", os.devnull]
        command += [ROOT / "engine/cuda/kernels/all.cu"]
        said = run(*command, env=env, stderr=subprocess.PIPE, text=True).stderr
        found = re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
            said,
            re.DOTALL,
        )
        if not found:
            sys.exit(f"nvcc does not say what the kernels take:\n{said}")
        for name, stack, stores, loads, count, rest in sorted(found):
            shared = re.search(r"(\d+) bytes smem", rest)
            spill = int(stores) + int(loads)
            shown = shared[1] if shared else 0
            print(f"{name:32}{architecture:10}{count:>10}{shown:>8}{stack:>8}{spill:>8}")
            if spill or int(stack):
                spilled.append(f"{name} ({architecture})")
    if spilled:
        sys.exit(f"registers do not suffice for {', '.join(spilled)}")


def build():
    env = environment()
    packages = [word for package in PACKAGES for word in ("-p", package)]
    command = ["cargo", "build", "--release", "--locked", *packages]
    run(*command, "--features", ",".join(FEATURES), cwd=ROOT, env=env)
    registers(env)
    for name in BUILT:
        file = TARGET / "release" / name
        entries = run("readelf", "-d", file, stdout=subprocess.PIPE, text=True).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", entries)
        size = file.stat().st_size / 2**20
        print(f"{file.relative_to(ROOT)}: {size:.0f} MiB, needs {' '.join(needed)}")
        if "libcuda.so.1" not in needed:
            sys.exit(f"{name} has not been built for CUDA")
    print("compiled; nothing of it has been run on a GPU")


def main():
    match sys.argv[1:]:
        case ["build"]:
            build()
        case ["registers"]:
            registers(environment())
        case ["run", *command] if command:
            env = environment()
            paths = [libraries(Path(env["CUDA_HOME"])), os.environ.get("LD_LIBRARY_PATH")]
            env["LD_LIBRARY_PATH"] = ":".join(filter(None, paths))
            os.execvpe(command[0], command, env)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
