"""Our own lowering of kernels, run by NumPy: in interpreted tests, not by Pallas' interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(200)

ROOT = Path(__file__).parents[3]

# By file: which tests, and the kernels that they run.
TESTS = {
    "selection/test_kernels.py": (
        # Of the rotated query the interpreted kernel takes slices, which no lowered one does.
        "test_score_clusters or (test_score_tokens and float32) or config2 or config5 or config8",
        {"score_clusters", "combine_logsumexps", "pack_query", "score_tokens", "rank_clusters",
         "list_clusters", "bracket_clusters", "find_last_cluster", "pick_rows", "look_up_rows",
         "admit_rows"},
    ),
    "attend_zones/test_kernel.py": ("not lowers", {"attend_zones"}),
    "attend_zones/test_corrected.py": (
        "test_it_is_the_reference",
        {"find_runs", "find_remains", "attend_corrected"},
    ),
    "attend_dense": ("not lowers", {"attend_dense", "merge_states"}),
    "attend_appended": ("softmax and not 16", {"attend_appended"}),
    "append_rows": ("not lowers", {"append_rows"}),
    "build_clusters/test_kernel.py": (
        "not lowers",
        {"assign_tokens", "move_centroids", "cut_clusters", "average_pieces"},
    ),
    "build_moments/test_kernel.py": ("96-2", {"build_moments"}),
}  # fmt: skip


@pytest.mark.parametrize("file", TESTS)
def test_interpreted_tests_pass_on_what_our_lowering_writes(file):
    chosen, kernels = TESTS[file]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.evaluated_kernels"]
    command += ["-p", "no:cacheprovider", f"tests/pallas_kernels/{file}", "-k", chosen]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith("kernels evaluated"))
    for kernel in kernels:
        assert f"'{kernel}'" in said, said
