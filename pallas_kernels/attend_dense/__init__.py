from pallas_kernels.attend_dense.api import attend_dense as attend_dense
