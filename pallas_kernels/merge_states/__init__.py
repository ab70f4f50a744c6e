from pallas_kernels.merge_states.api import merge_states as merge_states
