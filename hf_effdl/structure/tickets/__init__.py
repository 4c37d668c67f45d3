"""Tickets.

search.py    `find_ticket` and `EarlyTicketCallback`
ticket.py    the noun: which units, and the weights to start them from
rewind.py    networks from a ticket: `rewind` for the same task, `transfer` for another
files.py     tickets as files, in a folder or on the Hub; card.py: their card
"""
