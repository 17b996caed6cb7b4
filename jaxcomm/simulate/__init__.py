"""What gradient exchange costs at sizes that are not at hand.

So far: how much each design negotiates, counted from its code (`control`). Times
are not predicted yet.
"""
