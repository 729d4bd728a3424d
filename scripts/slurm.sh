#!/usr/bin/env bash
# A run on several nodes of a SLURM cluster, one process a node, which shows all of the node's GPUs.
# Usage, in the repository's root: sbatch scripts/slurm.sh --config=configs/NAME.py --workdir=DIR [FLAGS]
# DIR and the repository with its .venv (scripts/setup gpu) lie on a file system that all nodes share.
# Edit the numbers below, or give them to sbatch: sbatch --nodes=8 scripts/slurm.sh ...
#
# Two minutes before its time is up, or when it is preempted, the job gets SIGTERM: it saves, ends with
# 143 and is queued again; it goes on where it stopped. Any other end is final.
#
#SBATCH --job-name=lmjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lmjax-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
trap : TERM # meant for the processes, which srun hands it to; this script has yet to queue them again

code=0
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  .venv/bin/python -m lmjax.train --distributed "$@" || code=$?
if [ "$code" -eq 143 ]; then
  echo "stopped and saved; queued again as job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
