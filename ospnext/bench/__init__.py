"""The benchmark of one denoising forward of the whole model, against what its kernels allow. `ospnext bench model` runs
it; scripts in benchmarks/ reuse its parts. Nothing here names a vendor.
"""
