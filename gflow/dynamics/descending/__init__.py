"""Gradient descent: ``method`` the loop on the device, ``run`` a descent on its way, ``step_meter`` how
long its steps are, ``step_sizes`` and ``paper_steps`` rules for them, ``optimizers`` and ``closures``
how an optax optimiser is held.
"""
