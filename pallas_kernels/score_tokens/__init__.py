from pallas_kernels.score_tokens.api import score_tokens as score_tokens
from pallas_kernels.score_tokens.reference import TokenScores as TokenScores
