"""Traces as token ids, token ids as the rows of a batch, and tokens as text for people."""
