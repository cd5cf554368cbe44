"""Radau IIA for gradient flow.

``tableau`` is the method, ``newton`` its equations, ``spectral`` large systems, ``batching`` small
ones for many members, ``part`` steps of many points of which few count, ``gauss_newton`` the solver
that diffrax and gflow's own loop call.
"""
