"""A data set in, the chosen rows out.

selector, pool               `UncertaintySelector`: score, plan, select; the pool as it reads it
selection, rows              `Selection`: report, plot, save, push, redraw; the rows and scores that all these take
findings, report, pictures   what can be read off chosen rows, in numbers, words and figures
files, card, source          on the disk, on the Hub, and where the pool came from
"""
