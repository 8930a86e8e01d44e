"""Attention on NPUs, one implementation a file. What several need is in packs.py, statistics.py and hif8.py."""
