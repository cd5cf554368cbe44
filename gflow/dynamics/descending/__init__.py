"""Gradient descent, from a step on the device to a run.

``method`` is the loop on the device, ``run`` a descent on its way, ``lanes`` many of them at once,
``step_meter`` how long steps are, ``step_sizes`` and ``paper_steps`` are rules for them,
``optimizers`` and ``closures`` hold an optax optimiser.
"""
