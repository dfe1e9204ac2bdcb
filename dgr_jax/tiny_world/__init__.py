"""A small invented world: the corpus, alignment data and suites of the embedded target model."""
