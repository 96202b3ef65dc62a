"""Which single weights go: rankings, schedules, and one-shot pruning that looks at the layer's inputs.

Weights are matrices `[outputs, inputs]` here; `trimpoint.sparsity.inputs` says how those of convolutions are laid out.
"""
