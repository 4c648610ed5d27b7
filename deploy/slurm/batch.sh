#!/bin/sh
# A file of requests in 64 shards, each on one GPU: sbatch deploy/slurm/batch.sh /models/keye requests.jsonl
# A shard that is lost or stopped is put back into the queue, and resumes.
#SBATCH --job-name=keye-batch
#SBATCH --array=0-63
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@60
set -eu
exec srun keye-jax batch --checkpoint "$1" --input "$2" --output results.jsonl
