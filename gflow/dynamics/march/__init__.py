"""The compiled loop that steps one or many members of a flow.

``loop`` is the march itself, ``lane`` where a member of it stands, ``method`` what it asks of a
solver, ``control`` the step size, ``land`` steps that end on an event, ``tolerance`` the size of an
error.
"""
