# From a dirty CSV to a model that is handed over, with commands alone. Run by test_seven_jobs.py, which writes the inputs.
set -euo pipefail

# 1. A CSV of support tickets, in another encoding, with repeated rows, empty answers and other languages
oumi_pl preview --config tickets.yaml -n 1 > preview.txt
oumi_pl fit --config tickets.yaml --name tickets

# 2. Chats beside the tickets, two in ten of what is trained; all weights, then an adapter
oumi_pl fit --config mixed.yaml --name mixed
oumi_pl fit --config mixed.yaml --name mixed-lora --model.lora.r 4

# 3. A run is killed and resumed; another one branches off one of its checkpoints with a lower rate
oumi_pl fit --config tickets.yaml --name killed --trainer.max_steps 40 --checkpoint.keep 9 > killed.txt 2>&1 &
until [ -e runs/killed/checkpoints/step-00000020.ckpt ]; do kill -0 $!; sleep 0.1; done
kill -KILL $! && wait $! || true
oumi_pl fit --resume runs/killed
oumi_pl fit --config tickets.yaml --name branch --ckpt_path runs/killed/checkpoints/step-00000020.ckpt \
  --trainer.max_steps 40 --model.optimizer.lr 1e-4
oumi_pl runs compare killed branch > compared.txt

# 4. Preferences, from the model of the first job; a metric of one's own chooses the best checkpoint
oumi_pl fit --config polite.yaml --name polite

# 5. An Oumi config, and the same as a recipe
oumi_pl train -c oumi.yaml
oumi_pl convert oumi.yaml > converted.yaml
oumi_pl fit --config converted.yaml --name converted

# 6. Answers to new tickets, with every column kept, and scored
oumi_pl generate --model runs/polite/model --file new.csv --columns prompt=ticket --output answers.csv \
  --max_new_tokens 24 --metric my_metrics.polite > scores.txt

# 7. Handed over: one model of base and adapter, a private repository, a quantized file, a conversation
oumi_pl export --checkpoint runs/mixed-lora --output served --merge
oumi_pl push served someone/tickets
oumi_pl export --checkpoint served --output gguf --format gguf --outtype q8_0
printf 'Where is parcel 7?\n' | oumi_pl chat --model served --max_new_tokens 24 > conversation.txt
