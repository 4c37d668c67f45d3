"""What the verbs of the command line do, once their options are read.

data        data sets by name, their splits and columns
tasks       model, rows and metric of a training task
cost        what a run would take: `--dry-run`
structure   sparsify, ticket, grow, lora-ranks
pretrained  slim
samples     select, score
prompts     what pool, fit and prompt share
fitting     fit
cards       card
"""
