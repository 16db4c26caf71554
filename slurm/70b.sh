#!/usr/bin/env bash
# Llama 3 70B on 64 nodes of 8 GPUs: tp 8, pp 8, dp 8.
# Submit from the repository root: sbatch slurm/70b.sh [key.sub=value ...]; docs/clusters.md says more.
#SBATCH --job-name=megallama-70b
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=7-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# sbatch runs a copy of this file from a spool folder.
exec bash "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/run.sh" configs/70b.yaml "$@"
