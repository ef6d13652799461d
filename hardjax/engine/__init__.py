"""What is compiled: the step, rounds of it, the plan of a run, rates, evaluation. Pure functions and frozen pytrees;
no files, no clock, no screen."""
