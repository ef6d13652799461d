"""One run, where the engine meets clock, files and screen."""
