"""The C++ tests under the sanitizers: memory, undefined behaviour, data races."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import scaled

NATIVE = Path(__file__).parents[2] / "native"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "weightsync"

# The pinned build tools of this environment, whatever else the machine has.
TOOLS = Path(sys.executable).parent

# Optimised where the sanitizer allows it cheaply: what is compiled here is run for seconds only.
KINDS = {"address,undefined": "-O0 -fno-sanitize-recover=all", "thread": "-O1"}


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def is_supported(kind: str, scratch: Path) -> bool:
    source = scratch / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    probe = scratch / "probe"
    command = ["c++", f"-fsanitize={kind}", str(source), "-o", str(probe)]
    return (
        subprocess.run(command, capture_output=True, check=False).returncode == 0
        and subprocess.run([str(probe)], capture_output=True, check=False).returncode == 0
    )


def digest_of(kind: str) -> str:
    """Names a build by all it is made of."""
    sources = [NATIVE / "CMakeLists.txt"]
    for folder in (
        "include",
        "src/core",
        "src/cuda",
        "src/engine",
        "src/fabrics",
        "src/net",
        "tests",
    ):
        sources += sorted((NATIVE / folder).rglob("*.?pp"))
    digest = hashlib.sha256(f"{kind} {KINDS[kind]} {run('c++', '--version')}".encode())
    for path in sources:
        digest.update(path.relative_to(NATIVE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(kind: str) -> Path:
    name = f"native-tests-{kind.split(',')[0]}"
    program = CACHE / f"{name}-{digest_of(kind)}"
    if program.exists():
        return program
    folder = CACHE / f"build-{name}"
    options = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": KINDS[kind],
        "CMAKE_UNITY_BUILD": "ON",  # a quarter of the time
        "CMAKE_UNITY_BUILD_BATCH_SIZE": "16",  # some for each core
        "WEIGHTSYNC_SANITIZE": kind,
        "WEIGHTSYNC_BUILD_MODULE": "OFF",
        "WEIGHTSYNC_BUILD_TESTS": "ON",
    }
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={TOOLS / 'ninja'}", "--fresh"]
    definitions = [f"-D{key}={value}" for key, value in options.items()]
    run(TOOLS / "cmake", "-S", NATIVE, "-B", folder, *generator, *definitions)
    run(TOOLS / "ninja", "-C", folder, "weightsync_tests")
    for old in CACHE.glob(f"{name}-*"):
        old.unlink()
    shutil.copy2(folder / "weightsync_tests", program)
    return program


@pytest.mark.timeout(scaled(600, 2400))  # the first run compiles
@pytest.mark.parametrize("kind", KINDS)
def test_native_tests_are_clean(kind: str, tmp_path: Path) -> None:
    if not is_supported(kind, tmp_path):
        pytest.skip(f"this compiler cannot link -fsanitize={kind}")
    program = build(kind)
    for _ in range(scaled(1, 20)):
        output = run(program, TSAN_OPTIONS="halt_on_error=1", ASAN_OPTIONS="detect_leaks=1")
        assert output.splitlines()[-1].endswith("tests passed")
