#!/usr/bin/env bash
# The paper's experiments in small (docs/results.md): takes all runs, or goes on with what is left of them.
#     examples/paper/sweep.sh [FOLDER] [options of `hvd-lb sweep run`, such as --jobs 2]
# 80 runs of about a minute and a half of one core each. Everything may be interrupted at any time.
set -euo pipefail

folder=${1:-sweeps/paper}
shift || true
options=("$@")
recipe=$(dirname "${BASH_SOURCE[0]}")/recipe.yaml

sweep() {
    hvd-lb sweep run "$folder" --recipe "$recipe" --device cpu --seeds 5 "${options[@]}" "$@"
}

# Figure 1: error against minibatch, until it breaks. The baseline is 64 images (4 workers), which the rate is for.
sweep --vary gpus=4,32
sweep --vary gpus=16,128,8,64
# Table 2a: eight times the baseline's minibatch, with each warmup.
sweep --vary gpus=32 --vary warmup=none,constant
# Table 2b: other rules for the learning rate.
sweep --vary gpus=32 --vary lr_rule=sqrt,none
# Remark 2: no momentum correction, with warmup and with drops of the rate.
sweep --vary gpus=32 --vary momentum_correction=false
# Table 2c: γ = 1 in the last batch norm of each block.
sweep --vary gpus=4,32 --vary zero_gamma=false
# Remarks 1 and 3: gradients divided by n k0 (k0 = 4) at the baseline's rate, which is the linear rule with λ/8.
sweep --vary gpus=32 --vary weight_decay=0.0000625
# Remark 4: each worker shuffles a share of its own.
sweep --vary gpus=32 --vary shuffle=per-worker
# More of figure 1.
sweep --vary gpus=256
hvd-lb sweep table "$folder" --last 1
