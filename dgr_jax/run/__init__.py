"""What every stage needs: atomic files, manifests, shards, several hosts, progress. Knows nothing of models."""
