"""What every pillar's pushes share; it knows no pillar.

cards         a table in Markdown, a card from a template, written whole
eval_results  results as the leaderboards of the Hub read them
repos         whether a repository on the Hub may be written to
templates/    the cards' texts
"""
