from pallas_kernels.append_rows.api import append_rows as append_rows
