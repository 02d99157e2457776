"""Times the CPU kernels of two commits in one process, in turns, where machines are too noisy for two runs.

    python tools/versions.py BEFORE [AFTER] --work DIR [--precisions f32 int16 int8] [--rounds 12]

AFTER is the working tree by default. The vision tower and the encoder run at base shape with made-up
weights, part by part; what is printed is the least time of each part, which neighbours disturb least.
Commits before blocks worked in place have other functions and cannot be compared.
"""

import argparse
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ["engine/src/kernels", "engine/src/child.rs"]
MANIFEST = """[package]
name = "{name}"
version = "0.0.0"
edition = "2024"

[features]
bench = []

[dependencies]
{dependencies}
"""
KERNELS = """bytemuck = { version = "1", features = ["derive", "must_cast"] }
libc = "0.2"
memmap2 = "0.9"
pulp = { version = "0.22", features = ["x86-v4"] }
rayon = "1"
"""
BOTH = """before = { path = "../before" }
after = { path = "../after" }
rayon = "1"
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


def sources(commit):
    """The files of a commit, or of the working tree, by their path in engine/src."""
    if commit is None:
        names = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, check=True, capture_output=True, text=True)
        return {Path(name).relative_to("engine/src"): (ROOT / name).read_bytes() for name in names.stdout.splitlines()}
    archive = subprocess.run(["git", "archive", commit, *SOURCES], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        return {Path(file.name).relative_to("engine/src"): files.extractfile(file).read() for file in files if file.isfile()}


def package(directory, name, dependencies, files):
    write(directory / name / "Cargo.toml", MANIFEST.format(name=name, dependencies=dependencies).encode())
    for path, text in files.items():
        write(directory / name / "src" / path, text)


def main():
    args = argparse.ArgumentParser()
    args.add_argument("before")
    args.add_argument("after", nargs="?")
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--precisions", nargs="+", default=["f32", "int16", "int8"])
    args.add_argument("--threads", default=str(os.cpu_count()))
    args.add_argument("--rounds", default="12")
    args = args.parse_args()
    directory = args.work / "versions"
    for name in ("before", "after"):
        shutil.rmtree(directory / name / "src", ignore_errors=True)
    tower = (ROOT / "tools/versions/tower.rs").read_bytes()
    for name, commit in {"before": args.before, "after": args.after}.items():
        package(directory, name, KERNELS, sources(commit) | {Path("lib.rs"): tower})
    package(directory, "compare", BOTH, {Path("main.rs"): (ROOT / "tools/versions/main.rs").read_bytes()})
    write(directory / "Cargo.toml", b'[workspace]\nmembers = ["before", "after", "compare"]\nresolver = "3"\n')
    write(directory / "Cargo.lock", (ROOT / "Cargo.lock").read_bytes())
    subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=directory, check=True)
    for precision in args.precisions:
        subprocess.run([directory / "target/release/compare", precision, args.threads, args.rounds], check=True)


if __name__ == "__main__":
    main()
