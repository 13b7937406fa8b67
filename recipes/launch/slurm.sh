#!/bin/sh
#SBATCH --job-name=oumi_pl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue --open-mode=append
#SBATCH --signal=USR1@300
# Submit with `sbatch slurm.sh sft/llama3.1_8b_fsdp2`, after adapting the lines above. The run folder and OUMI_PL_CACHE
# have to be on a disk that all nodes see.
#
# Five minutes before the time limit SLURM sends SIGUSR1. The run finishes its update, saves and exits with 138. This
# script then puts the job back into the queue, and `--resume auto` continues the run. After SIGTERM (`scancel`, or
# preemption, where SLURM itself requeues the job) the run saves as well, and exits with 143. Any other exit code is that
# of the run: 0 finished, 1 a fault, 2 a mistake in the recipe or the command.
srun --wait=60 python -m oumi_pl fit --resume auto --config "$@" \
  --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_JOB_NUM_NODES"
code=$?
[ $code = 138 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
