"""README.md says what is true, and the types say it too."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SAMPLES, Server

PACKAGE = Path(__file__).parents[1]


def test_every_example_prints_what_the_readme_says(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (PACKAGE / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```\n", text, re.M | re.S)
    assert len(blocks) == text.count("```python")
    monkeypatch.chdir(SAMPLES)
    names: dict[str, object] = {}
    for code, expected in blocks:
        code = code.replace("localhost:6379", f"127.0.0.1:{server.port}")
        code = code.replace("redis.Redis(", f"redis.Redis(port={server.port}, ")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == expected
    names["florence"].close()  # type: ignore[attr-defined]
    names["client"].close()  # type: ignore[attr-defined]


def test_the_package_and_a_program_of_a_user_pass_mypy() -> None:
    source = PACKAGE / "src"
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", source, PACKAGE / "tests/sample.py"],
        env={**os.environ, "MYPYPATH": str(source)},
        capture_output=True,
        text=True,
        cwd=PACKAGE,
    )
    assert run.returncode == 0, run.stdout + run.stderr
