from pallas_kernels.score_tokens._query import PackedQuery as PackedQuery
from pallas_kernels.score_tokens.api import score_tokens as score_tokens
