"""Asks a device what only it can answer: the items that a backend's manifest names. See `ospnext.ops.acceptance`.

ask.py asks one item, worker.py is the process that does so, run.py outlives it and keeps the record, render.py shows
it. What is asked is the backend's."""
