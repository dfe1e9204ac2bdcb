"""A study: arms and seeds, each refined, fine-tuned and evaluated, held against the paper's claims in a report."""
