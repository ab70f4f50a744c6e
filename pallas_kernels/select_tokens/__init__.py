from pallas_kernels.select_tokens.api import select_tokens as select_tokens
from pallas_kernels.select_tokens.reference import Retrieved as Retrieved
from pallas_kernels.select_tokens.reference import RowTable as RowTable
from pallas_kernels.select_tokens.reference import empty_table as empty_table
from pallas_kernels.select_tokens.reference import segment_start as segment_start
