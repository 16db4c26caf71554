#!/usr/bin/env bash
# A Llama of 1.1B parameters on one node of 8 GPUs: dp 8.
# Submit from the repository root: sbatch slurm/1b.sh [key.sub=value ...]; docs/clusters.md says more.
#SBATCH --job-name=megallama-1b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=7-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# sbatch runs a copy of this file from a spool folder.
exec bash "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/run.sh" configs/1b.yaml "$@"
