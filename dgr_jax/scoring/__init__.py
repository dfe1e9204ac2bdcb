"""The jitted log-likelihood scorer: traces in, log-probabilities of their response tokens out."""
