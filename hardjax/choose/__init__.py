"""The papers' ideas as pure functions: which mini-batches or samples are trained, and what share of each batch."""
