"""Run MmAP and its tests in new virtual environments; prints a line each, exits with 1 on failure.

    python tests/try_versions.py python3.11 python3.12 python3.13 python3.11:2.6.0:0.21.0

An argument is an interpreter, followed by the versions of torch and torchvision if they are not
those of .ci/constraints.txt. The other packages are those of .ci/constraints.txt, with a setuptools
that has no pkg_resources. The losses of a run's two epochs are compared with those in the first
environment.
"""
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["tests/test_encoders.py", "tests/test_mmap.py", "tests/test_weights.py"]
VERSIONS = """
import platform, torch, torchvision, importlib.metadata as packages
print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision "
      f"{torchvision.__version__}, setuptools {packages.version('setuptools')}")"""


def run(*command):
    """A command's stdout; if it fails, RuntimeError with the end of its output."""
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def losses_in(environment, python, pins):
    """Make an environment, run MmAP and the tests in it: (its versions, test counts, losses)."""
    constraints = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    for package, version in zip(("torch", "torchvision"), pins):
        constraints = re.sub(rf"(?m)^{package}==.*", f"{package}=={version}", constraints)
    (environment / "constraints.txt").write_text(constraints, encoding="utf-8")
    run(python, "-m", "venv", environment / "venv")
    python = environment / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-r", "requirements.txt", "setuptools>=84",
        "-c", environment / "constraints.txt")
    versions = run(python, "-W", "ignore", "-c", VERSIONS).strip()
    folder = environment / "run"
    run(python, "mmap.py", "--epochs", 1, "--shots", 1, "--device", "cpu", "--out", folder)
    counts = run(python, "-m", "pytest", "-q", "-W", "ignore", *TESTS).strip().split("\n")[-1]
    with open(folder / "log.csv", encoding="utf-8", newline="") as file:
        return versions, counts, [float(row["loss"]) for row in csv.DictReader(file)]


def main(arguments):
    first = None
    failed = False
    for argument in arguments:
        python, *pins = argument.split(":")
        with tempfile.TemporaryDirectory() as environment:
            try:
                versions, counts, losses = losses_in(Path(environment), python, pins)
            except RuntimeError as error:
                print(f"{argument} failed: {error}", flush=True)
                failed = True
                continue
        first = first or losses
        difference = max(abs(a - b) for a, b in zip(first, losses, strict=True))
        print(f"{versions}: mmap.py ran, {counts}, losses within {difference:.0e}", flush=True)
        failed = failed or difference > 1e-5
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
