"""Transformer weights on disk: names, files, configs. Nothing here builds a model; `ospnext.models.loading` does."""
