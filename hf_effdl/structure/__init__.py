"""Structure selection: which filters and neurons a model needs. Floors, lowest first:

groups    the noun: n deletable units and the tensor slices that go together; found, silenced, removed
optim     `SplitLBI`: SGD or AdamW that also traces the regularisation path of its lifted parameters
path      what a run says of every unit, and which units a budget keeps
slim      the smaller dense model, and what that bought
training  `SplitLBITrainer`: all of the above in one run of a transformers Trainer
tickets   the units a run had settled on early, and networks that start again from them
growing   the other way: from few units, wider and deeper where the support saturates
"""
