"""Traces: the record, its files, and the published data sets that become it."""
