"""wavejax: long-context decoding over a clustered KV cache (RetroInfer, arXiv 2505.02922)."""

from models.errors import InputError as InputError
from wavejax.buffer import RowCache as RowCache
from wavejax.buffer import RowStore as RowStore
from wavejax.buffer import SteadyZone as SteadyZone
from wavejax.config import WaveConfig as WaveConfig
from wavejax.dense_attention import DenseAttention as DenseAttention
from wavejax.generator import DecodeState as DecodeState
from wavejax.generator import Generator as Generator
from wavejax.index import WaveIndex as WaveIndex
from wavejax.plan import Plan as Plan
from wavejax.plan import make_plan as make_plan
from wavejax.sampling import Sampler as Sampler
from wavejax.wave_attention import WaveAttention as WaveAttention
from wavejax.wave_state import WaveState as WaveState
