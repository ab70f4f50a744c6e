"""The ops of a decode step over a clustered KV cache, and of the plain one it is compared with.

Each op is a folder: `__init__.py` (the public function), `reference.py` (its meaning, in plain
JAX) and `triton.py` (its kernels for GPUs). `shapes.py` names the real shapes that tests and
benchmarks share; `testing.py` makes inputs of them.
"""

from pallas_kernels.append_rows import append_rows as append_rows
from pallas_kernels.attend_dense import attend_dense as attend_dense
from pallas_kernels.attend_zones import attend_zones as attend_zones
from pallas_kernels.build_clusters import build_clusters as build_clusters
from pallas_kernels.dispatch import explain as explain
from pallas_kernels.dispatch import forget as forget
from pallas_kernels.dispatch import use_implementation as use_implementation
from pallas_kernels.encode_tokens import encode_tokens as encode_tokens
from pallas_kernels.explanation import Choice as Choice
from pallas_kernels.explanation import Explanation as Explanation
from pallas_kernels.explanation import FallbackWarning as FallbackWarning
from pallas_kernels.merge_states import merge_states as merge_states
from pallas_kernels.score_clusters import score_clusters as score_clusters
from pallas_kernels.score_tokens import score_tokens as score_tokens
from pallas_kernels.select_clusters import select_clusters as select_clusters
from pallas_kernels.select_tokens import select_tokens as select_tokens
