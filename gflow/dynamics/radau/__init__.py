"""Radau IIA for gradient flow.

``tableau`` is the method, ``newton`` its equations, ``batching`` small systems for many members,
``gauss_newton`` the solver that diffrax and gflow's own loop call.
"""
