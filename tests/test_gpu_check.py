"""What anybody with a GPU runs once, `benchmarks/gpu_check.sh`: its options, and its form for a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarking import named

from benchmarks import report

ROOT = Path(__file__).parent.parent


def gpu_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [(), ("out", "--only", "tea"), ("out", "--device", "tpu"), ("a", "b")])
def test_what_the_check_of_a_gpu_refuses(tmp_path, arguments):
    done = gpu_check(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert not (ROOT / "out").exists()


@pytest.mark.slow
def test_the_check_of_a_gpu_in_its_form_for_a_cpu(tmp_path):
    done = gpu_check(tmp_path, "--device", "cpu", "--tiny")
    summary = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0, summary
    for part in ("build", "machine", "tests", "step", "kernels", "pixel_block", "profile"):
        assert re.search(rf"^{part}: passed in \d+ s$", summary, re.MULTILINE), summary
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {f"{name}.csv" for name in ("machine", "step", "kernels", "pixel_block")} | {
        "summary.txt",
        "tests.txt",
        "profile.txt",
    }
    assert named(report.read(tmp_path / "step.csv"), "case") == {("all_terms",)}
    assert " passed" in (tmp_path / "tests.txt").read_text()
    assert "aten::" in (tmp_path / "profile.txt").read_text()


@pytest.mark.slow
def test_a_part_that_fails_does_not_end_the_check(tmp_path):
    done = subprocess.run(
        ["bash", "benchmarks/gpu_check.sh", str(tmp_path), "--device", "cpu", "--only", "build,kernels"],
        env=os.environ | {"PYTHON": "false"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "build: FAILED" in done.stdout and "kernels: FAILED" in done.stdout
