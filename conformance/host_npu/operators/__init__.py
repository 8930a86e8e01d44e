"""CPU arithmetic of the operators of namespace `npu` that a backend may call, one family per file.

Written from the vendor's documents, whose traps are kept: an argument that the device ignores is ignored, what it
refuses is refused by name. Sums are fp32 and results are rounded once; fp64 is refused. Each file maps names of
operators to functions of CPU tensors in the order of the schema (KERNELS). Nothing here knows torch_npu or a backend.
"""
