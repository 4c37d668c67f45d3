"""LoRA adapters whose ranks a path chose.

select.py   `select_lora_ranks`: the ranks that a budget keeps, as a plain adapter that PEFT loads alone
budget.py   which ranks that are
initial.py  adapters that began with a part of the base weights, as what training has changed
picture.py  ranks over layers and kinds of modules, and when they entered
"""
