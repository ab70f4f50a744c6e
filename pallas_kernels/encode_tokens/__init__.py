from pallas_kernels.encode_tokens.api import encode_tokens as encode_tokens
from pallas_kernels.encode_tokens.reference import TokenCodes as TokenCodes
from pallas_kernels.encode_tokens.reference import rotate as rotate
from pallas_kernels.encode_tokens.reference import rotation as rotation
