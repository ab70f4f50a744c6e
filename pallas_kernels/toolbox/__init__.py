"""What the Triton kernels share, each file named after its purpose."""
