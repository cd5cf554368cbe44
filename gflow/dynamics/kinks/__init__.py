"""Flows of networks with kinks: from one pattern of gates to the next.

``decide`` says which units cross, slide or leave at a kink, ``landing`` ends a step there,
``patterns`` builds the arrays that a frozen network is made of, and ``kinked`` is what a run asks.
"""
