#!/usr/bin/env bash
# Everything that a GPU or TPU should confirm, in this order: exactness, reliability, memory and
# time of every way to train, what fits, and a long run of the paper's network. Results go to
# experiments/results, under the device's name; a run that is cut off continues when the script is
# started again.
#
#     bash experiments/accelerator.sh DATA_DIR [STEPS]
#
# DATA_DIR holds a prepared CIFAR-10 (TFDS); STEPS is how far to train this time (the whole is
# 156,000: 400 epochs). XLA picks matrix-multiply kernels by timing them; should exactness fail on
# a GPU, the second run of exactness.py shows what deterministic kernels change.
set -uo pipefail
cd "$(dirname "$0")"
data=${1:?the folder of prepared TFDS sets}
until=${2:-156000}
here="--out results"
large="--device-sized --dtypes bfloat16"

python exactness.py $here
XLA_FLAGS="--xla_gpu_deterministic_ops=true" python exactness.py --quick --out ../runs/deterministic
python reliability.py $here
python measure/costs.py --part activations --networks stack --values 8 16 32 64 $here
python measure/costs.py --part activations --networks vit --values 6 12 24 48 96 $here
python measure/costs.py --part gradients --networks stack --dtypes float32 bfloat16 --rounds 12 $here
for part in steps besides; do
  python measure/costs.py --part "$part" --networks vit gpt2 llama $large $here
done
python measure/costs.py --part totals --networks vit gpt2 llama --values 12 24 48 $here
python measure/costs.py --part equal --networks vit gpt2 llama --fit 24 $large $here
python measure/costs.py --part plans $here

# Six blocks of width 512, batch 128, the paper's schedule; BDIA-ViT and its ViT twin in turns.
for method in bdia standard; do
  python vit.py --out "../runs/cifar10-$method" --resume \
    --data cifar10 --data-dir "$data" \
    --model.width 512 --model.heads 8 --model.head-dim 64 --model.hidden 512 --model.patch-size 4 \
    --model.method "$method" --model.dtype bfloat16 \
    --train.steps 156000 --train.optimizer set-adam --train.learning-rate 1e-4 --train.clip-norm None \
    --train.eval-every 1950 --train.checkpoint-every 1950 --train.log-every 195 \
    --train.stop-at "$until"
done
