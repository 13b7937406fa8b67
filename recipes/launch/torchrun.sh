#!/bin/sh
# One node: `sh torchrun.sh sft/llama3.1_8b_fsdp2`. Several: the same on each, with NODES and HEAD (host:port of one).
#
# torchrun sets the number of devices and nodes, so leave `trainer.devices` and `trainer.num_nodes` out of the recipe.
# If a rank dies, torchrun ends the others, prints the first error, and starts the group again up to RESTARTS times;
# `--resume auto` then continues from the newest checkpoint, bit for bit.
# Stop it with Ctrl-C or SIGTERM: the update is finished and saved, and the same command continues (exit code 130 or 143).

# a new store for each start: in the old one, ranks find addresses of processes that are gone, and wait for them
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
  --nnodes "${NODES:-1}" \
  --nproc-per-node "${DEVICES:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${NAME:-run}" \
  --max-restarts "${RESTARTS:-3}" \
  -m oumi_pl fit --resume auto --config "$@"
