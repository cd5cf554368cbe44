"""Flows of networks with kinks: from one pattern of gates to the next.

``decide`` says which units cross, slide or leave at a kink, ``landing`` ends a step there, ``over``
mends a step that has passed kinks, ``patterns`` builds the arrays that a frozen network is made of,
``piece`` is the smooth piece of the flow that a run is in, and ``kinked`` is what a run asks.
"""
