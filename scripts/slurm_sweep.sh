#!/usr/bin/env bash
#SBATCH --array=0-7 --cpus-per-task=4 --time=12:00:00 --signal=B:TERM@300 --requeue
# One sweep by every task of a Slurm array, over a folder that all nodes share: leases deal out its cells (docs/sweep.md).
# sbatch --array=0-15 scripts/slurm_sweep.sh --dataset mnist --batch-sizes 8 32 --seeds 3 --output /shared/grid
set -euo pipefail
refuse() { echo "slurm_sweep.sh: Expected $1." >&2; exit 2; }
[[ ${SLURM_ARRAY_TASK_ID:-} =~ ^[0-9]+$ ]] || refuse "to run in a task of an array: sbatch --array=0-7 $0 ..."
[[ " $* " =~ " --output"[\ =] ]] || refuse "--output DIR, a folder that all nodes share"
[[ ! " $* " =~ " --"(overwrite|retry-failed|workers)[\ =] ]] || refuse "no --${BASH_REMATCH[1]}, which every task would be given"
exec hardjax sweep --workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
