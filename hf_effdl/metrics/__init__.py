"""Metrics of visual in-context learning for `evaluate`, loaded by path and without network:

    from importlib.resources import files
    metric = evaluate.load(str(files("hf_effdl.metrics") / "foreground_iou"))

`evaluate` copies the one file that it loads, so each stands alone and some lines stand in all three.
"""
