"""Many runs: arms set side by side, statistics, what finished runs are asked afterwards."""
