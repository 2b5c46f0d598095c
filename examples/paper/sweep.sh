#!/usr/bin/env bash
# The paper's experiments in small (docs/results.md): takes all runs, or goes on with what is left of them.
#     examples/paper/sweep.sh [FOLDER] [options of `hvd-lb sweep run`, such as --jobs 2]
# 85 runs of about two minutes of one core each. Everything may be interrupted at any time.
set -euo pipefail

folder=${1:-sweeps/paper}
shift || true
options=("$@")
recipe=$(dirname "${BASH_SOURCE[0]}")/recipe.yaml

sweep() {
    hvd-lb sweep run "$folder" --recipe "$recipe" --device cpu --seeds 5 "${options[@]}" "$@"
}

# Table 2a: 32 times the baseline's minibatch, with each warmup.
sweep --vary gpus=4
sweep --vary gpus=128 --vary warmup=gradual,none,constant
# Figure 1: error against minibatch, until it breaks.
sweep --vary gpus=4,32,512
sweep --vary gpus=16,64,256,1024
# Table 2b: other rules for the learning rate.
sweep --vary gpus=128 --vary lr_rule=sqrt,none
# Table 2c: γ = 1 in the last batch norm of each block.
sweep --vary gpus=4,128 --vary zero_gamma=false
# Remark 2: no momentum correction, with warmup and with drops of the rate.
sweep --vary gpus=4,128 --vary momentum_correction=false
# Remarks 1 and 3: gradients divided by n k0 (k0 = 4) at the baseline's rate, which is the linear rule with λ/32.
sweep --vary gpus=128 --vary weight_decay=0.000015625
hvd-lb sweep table "$folder" --last 1
