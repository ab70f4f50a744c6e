"""The site builds without a warning."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow(30)
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the extra `docs` is not installed",
)
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reference = (tmp_path / "api/index.html").read_text(encoding="utf-8")
    for name in ("wavejax.Generator", "wavejax.WaveAttention", "pallas_kernels.score_clusters"):
        assert name in reference


def test_the_sites_list_has_every_page():
    """Without the extra too: the site's build refuses a page that it does not list."""
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert len(pages) > 20
    assert not {page for page in pages if page not in listed}
