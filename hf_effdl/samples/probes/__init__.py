"""The models that are asked how sure they are of each row.

probes                         what all probes can: logits, out-of-bag predictions, trying a training set out
linear_probes, trained_probes  two ways to make them
inputs                         how rows of a data set become the inputs of a model
scoring                        all scores of a pool in one pass, on any number of processes, resumable
dynamics_callback              training dynamics recorded by any Trainer
row_marks                      a number for the content of every row
"""
