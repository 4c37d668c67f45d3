"""The command line `hf-effdl`: one file a verb, each a thin door to the public names.

__main__    the verbs, what is said of them, errors and exit codes
arguments   options as dataclasses, from the command line and a YAML file; the help
options     what several verbs ask for
work/       what the verbs do; only there torch is imported
sparsify, slim, ticket, choose, grow, lora_ranks, select, score, pool, fit, prompt, card, env    the verbs
"""
