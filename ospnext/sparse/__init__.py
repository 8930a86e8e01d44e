"""Sparse attention patterns as pure integer geometry; no model code and no kernels."""

from ospnext.sparse.skiparse import Grid, Order, OrderKind, SkiparsePlan, skiparse_plan

__all__ = ["Grid", "Order", "OrderKind", "SkiparsePlan", "skiparse_plan"]
