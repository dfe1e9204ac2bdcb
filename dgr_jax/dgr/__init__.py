"""The paper: ask the target model for a rewrite, filter it, fall back to the original, and measure the shift."""
