"""Radau IIA for gradient flow: ``tableau`` the method, ``newton`` its equations, ``gauss_newton``
the solver that diffrax and gflow's own loop call.
"""
