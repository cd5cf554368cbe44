"""The compiled loop that steps one or many members: ``loop`` the march itself, ``method`` what it
asks of a solver, ``control`` the step size, ``land`` steps that end on a target, ``tolerance`` the
size of an error.
"""
