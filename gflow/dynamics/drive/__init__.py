"""The host's side of a run: ``drive`` the loop that brings members from saved point to saved point,
``lanes`` the compiled programs that they share, ``flow_run`` the plan of a flow, ``events`` where a
run stops or is saved, ``recorder``, ``checkpoint``, ``certify``, ``members`` and ``progress``.
"""
