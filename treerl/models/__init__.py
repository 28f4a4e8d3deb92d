"""Language models: one decoder-only transformer, its sizes, and its use as a policy."""
