"""Radau IIA for gradient flow.

``tableau`` is the method; ``newton`` its equations and their iteration, made of what is in
``stages``; ``jacobian`` its linear systems, of which ``spectral`` solves large ones and
``batching`` small ones of many members; ``ending`` the end of a step; ``part`` steps of many points
of which few count; ``gauss_newton`` the solver that diffrax and gflow's own loop call.
"""
