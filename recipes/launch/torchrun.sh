#!/bin/sh
# One node: `sh torchrun.sh sft/llama3.1_8b_fsdp2`. Several: the same on each, with NODES and HEAD (host:port of one).
#
# torchrun sets the number of devices and nodes, whatever the recipe says. If a rank dies, torchrun ends the others, prints
# the first error, and starts the group again up to RESTARTS times; `--resume auto` then continues from the newest
# checkpoint, bit for bit. Ctrl-C or SIGTERM let the update end and be saved, if that takes less than 30 seconds; then the
# same command continues.

# a new store for each start: in the old one, ranks find addresses of processes that are gone, and wait for them
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
  --nnodes "${NODES:-1}" \
  --nproc-per-node "${DEVICES:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${NAME:-run}" \
  --max-restarts "${RESTARTS:-3}" \
  -m oumi_pl fit --resume auto --config "$@" --trainer.devices auto --trainer.num_nodes 1
